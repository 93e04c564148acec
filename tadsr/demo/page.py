"""The demo's page, in gradio."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import gradio as gr
from gradio.data_classes import FileData

from tadsr.config import ColorFix
from tadsr.demo.restoring import (
    Choices,
    DemoLimits,
    Models,
    canvas_for,
    draw_sweep,
    paint_of,
    reads_text,
    restore,
)
from tadsr.errors import TADSRError

MAX_WAITING = 32
"""Requests that wait; more are told to come back."""
CACHE_SECONDS = 3600
"""How long uploads and results are kept."""
CLEANING_SECONDS = 600
"""How often it is looked for what is older."""
SHOWN_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".gif"})
"""What every browser shows; other photos are restored without being seen first."""
SWEEP_TIMESTEPS = (1, 300, 600, 900)
TILE_CHOICES = [("automatic", "auto"), ("512 px", 512), ("1024 px", 1024), ("everywhere", 0)]
DEFAULT_TIMESTEP, DEFAULT_PAINTED, MAX_SCALE = 500, 1, 8

PROGRESS = gr.Progress()
"""Marks the argument that gradio gives a bar to."""

_ABOUT = """# tadsr
Enlarges and restores a photo in one step. The **timestep** decides how far it may go: a small one
stays faithful, a large one makes it vivid."""
_PAINTING = """Paint where the photo should have another timestep: faces and lettering, so that they
stay as they are, or foliage, so that it gets rich. The colour does not matter."""

_log = logging.getLogger(__name__)


def build(models: Models, limits: DemoLimits) -> gr.Blocks:
    """Build the page.

    Args:
        models: What the visitor chooses from; the first is loaded now.
        limits: What is refused.

    Returns:
        The page with its queue: one photo is computed at a time.
    """
    first = models.get(models.names[0])
    with gr.Blocks(
        title="tadsr", analytics_enabled=False, delete_cache=(CLEANING_SECONDS, CACHE_SECONDS)
    ) as page:
        gr.Markdown(_ABOUT)
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                photo = gr.Image(
                    label="Photo",
                    type="filepath",
                    image_mode=None,  # the file itself, with its 16 bits and its metadata
                    sources=["upload", "clipboard"],
                    elem_id="photo",
                    height=280,
                )
                # gradio would open it with Pillow alone, and fail with its own words.
                photo.preprocess = _path_of
                timestep = gr.Slider(
                    *(0, 999, DEFAULT_TIMESTEP),
                    step=1,
                    label="Timestep",
                    info="small: faithful, large: vivid",
                    elem_id="timestep",
                )
                prompt = gr.Textbox(
                    label="Prompt", placeholder="what the photo shows", visible=reads_text(first)
                )
                with gr.Accordion("More", open=False):
                    model = gr.Dropdown(
                        list(models.names),
                        value=models.names[0],
                        label="Model",
                        visible=len(models.names) > 1,
                    )
                    scale = gr.Slider(*(1, MAX_SCALE, 4), step=0.5, label="Scale")
                    color_fix = gr.Dropdown(
                        list(get_args(ColorFix)), label="Colours", value="adain"
                    )
                    tile_px = gr.Dropdown(
                        TILE_CHOICES,
                        value="auto",
                        label="Attention",
                        info="how far a place of a large result looks around",
                    )
                with gr.Accordion("Paint timesteps", open=False):
                    gr.Markdown(_PAINTING)
                    painted_timestep = gr.Slider(
                        *(0, 999, DEFAULT_PAINTED), step=1, label="Timestep of the paint"
                    )
                    painting = gr.ImageEditor(
                        label="Photo to paint on",
                        type="numpy",
                        image_mode="RGBA",
                        sources=[],
                        transforms=[],
                        layers=False,
                        brush=gr.Brush(default_size=40, colors=["#ff3b30"], color_mode="fixed"),
                        elem_id="painting",
                    )
                run = gr.Button("Restore", variant="primary", elem_id="run")
            with gr.Column(scale=2, min_width=480), gr.Tabs():
                with gr.Tab("Result"):
                    pair = gr.ImageSlider(
                        label="Bicubic | restored",
                        elem_id="pair",
                        type="pil",
                        format="png",  # WebP would blur what is compared
                        buttons=["fullscreen"],  # the file with every pixel is below
                        interactive=False,
                    )
                    summary = gr.Markdown(elem_id="summary")
                    download = gr.DownloadButton(
                        "Download PNG", interactive=False, elem_id="download"
                    )
                with gr.Tab("Sweep"):
                    sweep = gr.Button(
                        f"Restore at {', '.join(map(str, SWEEP_TIMESTEPS))}", elem_id="sweep"
                    )
                    sheet = gr.Image(
                        show_label=False,  # it would lie on the sheet's own
                        type="pil",
                        format="png",
                        buttons=["download", "fullscreen"],  # no sharing with a hub
                        interactive=False,
                        elem_id="sheet",
                    )

        shared = [photo, model, timestep, painted_timestep, painting, scale, prompt, color_fix]
        shared.append(tile_px)

        def run_restore(
            path: str | None, name: str, *values: Any, progress: gr.Progress = PROGRESS
        ) -> Iterator[tuple[Any, ...]]:
            with _as_sentences(), tempfile.TemporaryDirectory() as folder:
                found = restore(
                    models.get(name),
                    None if path is None else Path(path),
                    _choices(*values),
                    Path(folder),
                    limits=limits,
                    progress=_told_to(progress, "Restoring"),
                )
                # The page copies the file before it comes back here, where it is deleted.
                yield (
                    (found.before, found.after),
                    found.summary,
                    gr.update(value=str(found.file), interactive=True),
                )

        def run_sweep(
            path: str | None, name: str, *values: Any, progress: gr.Progress = PROGRESS
        ) -> Any:
            with _as_sentences():
                return draw_sweep(
                    models.get(name),
                    None if path is None else Path(path),
                    _choices(*values),
                    SWEEP_TIMESTEPS,
                    limits=limits,
                    progress=_told_to(progress, "Restoring"),
                )

        def forget_result() -> tuple[Any, ...]:
            return None, "", gr.update(value=None, interactive=False), None

        def show_canvas(path: str | None) -> Any:
            if path is None:
                return None
            with _as_sentences():
                canvas = canvas_for(Path(path), limits)
            suffix = Path(path).suffix.lower()
            if suffix not in SHOWN_SUFFIXES:
                gr.Info(f"browsers may not show {suffix[1:]} here; it is restored all the same")
            return canvas

        def show_prompt(name: str) -> Any:
            with _as_sentences():
                return gr.update(visible=reads_text(models.get(name)), value="")

        # One photo at a time: a second one would take the first one's memory and slow both.
        one = {"concurrency_id": "device", "concurrency_limit": 1}
        gr.on(
            [run.click], run_restore, shared, [pair, summary, download], api_name="restore", **one
        )
        sweep.click(run_sweep, shared, sheet, api_name="sweep", **one)
        photo.change(show_canvas, photo, painting, api_visibility="private")
        photo.change(
            forget_result, None, [pair, summary, download, sheet], api_visibility="private"
        )
        model.change(show_prompt, model, prompt, api_visibility="private", **one)
    return page.queue(max_size=MAX_WAITING)


def _path_of(upload: FileData | None) -> str | None:
    """Return where an upload is; gradio has checked that it is one."""
    return None if upload is None else upload.path


def _choices(
    timestep: float,
    painted_timestep: float,
    painting: dict[str, Any] | None,
    scale: float,
    prompt: str | None,
    color_fix: ColorFix,
    tile_px: int | Literal["auto"],
) -> Choices:
    return Choices(
        timestep=round(timestep),
        painted_timestep=round(painted_timestep),
        painted=paint_of(painting),
        scale=scale,
        prompt=prompt or "",  # a textbox that nobody wrote in gives None
        color_fix=color_fix,
        tile_px=None if tile_px == "auto" else tile_px,
    )


def _told_to(progress: gr.Progress, what: str) -> Callable[[float], None]:
    progress(0, desc=what)
    return lambda share: progress(share, desc=what)


@contextmanager
def _as_sentences() -> Iterator[None]:
    """Show what goes wrong in use as it is, and anything else without its inside."""
    try:
        yield
    except (TADSRError, ValueError, TypeError) as error:
        raise gr.Error(str(error), print_exception=False) from error
    except MemoryError as error:
        raise gr.Error("there is not enough memory for this; take a smaller photo") from error
    except gr.Error:
        raise
    except Exception as error:
        _log.exception("the demo failed")
        raise gr.Error("something went wrong; the server's log says what") from error
