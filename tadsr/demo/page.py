"""The demo's page, in gradio."""

from __future__ import annotations

import io
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, get_args

import gradio as gr
import numpy as np
from gradio.data_classes import GradioModel
from gradio.utils import get_upload_folder
from gradio_client.utils import is_http_url_like

from tadsr.config import ColorFix
from tadsr.demo.actions import (
    Choices,
    DemoLimits,
    Models,
    canvas_for,
    draw_sweep,
    paint_of,
    reads_text,
    restore,
    sentence_for,
    uploaded_file,
)
from tadsr.progress import paced

MAX_WAITING = 32
"""Requests that wait; more are told to come back."""
MAX_STOPPED = 10_000
"""Visitors who have pressed Stop and not Restore since."""
CACHE_SECONDS = 3600
"""How long uploads and results are kept."""
CLEANING_SECONDS = 600
"""How often it is looked for what is older."""
SHOWN_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".gif"})
"""What every browser shows; other photos are restored without being seen first."""
SWEEP_TIMESTEPS = (1, 300, 600, 900)
TILE_CHOICES = [("automatic", "auto"), ("512 px", 512), ("1024 px", 1024), ("everywhere", 0)]
DEFAULT_PAINTED, MAX_SCALE = 1, 8

PROGRESS = gr.Progress()
"""Marks the argument that gradio gives a bar to."""

BAR_SECONDS = 3
"""Between two messages of progress; at each the browser reads the painting back."""
EXAMPLE = Path(__file__).with_name("example.jpg")
_STYLE = """<style>
.gradio-container { overflow: clip !important; } /* hidden, as gradio has it, lets nothing stick */
#actions { position: sticky; bottom: 0.5rem; z-index: 20; }
@media (max-width: 900px) {
  #results { min-height: 100svh; }
}
</style>"""
"""The buttons stay in reach, as what is painted on makes the settings longer than a window. On a
phone, where the results lie below the settings, room is kept for them: the page moves there."""
_SHOW_RESULTS = """() => {
  const results = document.querySelector("#results"), top = results.getBoundingClientRect().top;
  const isSeen = 0 <= top && top < window.innerHeight / 2;
  if (document.querySelector("#photo img") && !isSeen) results.scrollIntoView({behavior: "smooth"});
}"""
"""Moves the page to where the progress and the result are, unless they are in sight."""
_COLORS = "adain: channels as in the photo; wavelet: light and shade too; none: the network's own"

_ABOUT = """# tadsr
Enlarges and restores a photo in one step. The **timestep** decides how far it may go: a small one
stays faithful, a large one makes it vivid."""
_PAINTING = """Paint where the photo should have another timestep: faces and lettering, so that they
stay as they are, or foliage, so that it gets rich. The colour does not matter."""


def build(models: Models, limits: DemoLimits) -> gr.Blocks:
    """Build the page."""
    first = models.get(models.names[0])
    uploads = Path(get_upload_folder())
    with gr.Blocks(
        title="tadsr", analytics_enabled=False, delete_cache=(CLEANING_SECONDS, CACHE_SECONDS)
    ) as page:
        gr.Markdown(_ABOUT)
        gr.HTML(_STYLE, padding=False)
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
                # gradio would open it with Pillow alone, and take any file of this machine.
                photo.preprocess = partial(_photo_of, uploads)
                _refuse_addresses(photo)
                example = gr.Button("Take the example photo", size="sm", elem_id="example")
                timestep = gr.Slider(
                    *(0, 999, first.default_timestep),
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
                        list(get_args(ColorFix)), label="Colours", value="adain", info=_COLORS
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
                    painting.preprocess = partial(_paint_of, uploads, painting)
                    _refuse_addresses(painting)
                with gr.Row(elem_id="actions"):
                    run = gr.Button("Restore", variant="primary", elem_id="run", min_width=120)
                    stop = gr.Button("Stop", variant="stop", elem_id="stop", min_width=80)
            with gr.Column(scale=2, min_width=480, elem_id="results"), gr.Tabs():
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

        choices = [timestep, painted_timestep, painting, scale, prompt, color_fix, tile_px]
        shared = [photo, model, *choices]

        stopped: set[str | None] = set()
        """Visitors who want no result any more."""

        def run_restore(
            request: gr.Request,
            path: Path | None,
            name: str,
            *values: Any,
            progress: gr.Progress = PROGRESS,
        ) -> Iterator[tuple[Any, ...]]:
            with _as_sentences(), tempfile.TemporaryDirectory() as folder:
                asked = (models.get(name), path, _choices(*values))
                tell = _told_to(progress, stopped, request.session_hash)
                found = restore(*asked, Path(folder), limits=limits, progress=tell)
                # The page copies the file before it comes back here, where it is deleted.
                kept = gr.update(value=str(found.file), interactive=True)
                yield (found.before, found.after), found.summary, kept

        def run_sweep(
            request: gr.Request,
            path: Path | None,
            name: str,
            *values: Any,
            progress: gr.Progress = PROGRESS,
        ) -> Any:
            with _as_sentences():
                asked = (models.get(name), path, _choices(*values))
                tell = _told_to(progress, stopped, request.session_hash)
                return draw_sweep(*asked, SWEEP_TIMESTEPS, limits=limits, progress=tell)

        def stop_it(request: gr.Request) -> None:
            if len(stopped) < MAX_STOPPED:  # anyone may send any number of names
                stopped.add(request.session_hash)

        def start_again(request: gr.Request) -> None:
            stopped.discard(request.session_hash)

        def take_example() -> Iterator[str]:
            # gradio takes files of the temporary folder, wherever the package lies.
            with tempfile.TemporaryDirectory() as folder:
                yield shutil.copy(EXAMPLE, folder)

        def forget_result() -> tuple[Any, ...]:
            return None, "", gr.update(value=None, interactive=False), None

        def show_canvas(path: Path | None) -> Any:
            if path is None:
                return None
            with _as_sentences():
                canvas = canvas_for(path, limits)
            suffix = path.suffix.lower()
            if suffix not in SHOWN_SUFFIXES:
                gr.Info(f"browsers may not show {suffix[1:]} here; it is restored all the same")
            return canvas

        def show_prompt(name: str) -> Any:
            with _as_sentences():
                return gr.update(visible=reads_text(models.get(name)), value="")

        # One photo at a time: a second one would take the first one's memory and slow both.
        one = {"concurrency_id": "device", "concurrency_limit": 1}
        # Neither is in the queue, where it would wait for what it is to stop.
        at_once = {"queue": False, "api_visibility": "private"}
        results = [pair, summary, download]
        run.click(start_again, js=_SHOW_RESULTS, **at_once).then(
            run_restore, shared, results, api_name="restore", **one
        )
        sweep.click(start_again, js=_SHOW_RESULTS, **at_once).then(
            run_sweep, shared, sheet, api_name="sweep", **one
        )
        stop.click(stop_it, **at_once)
        example.click(take_example, None, photo, api_visibility="private")
        canvas = {"concurrency_id": "canvas", "concurrency_limit": 1}
        photo.change(show_canvas, photo, painting, api_visibility="private", **canvas)
        photo.change(forget_result, None, [*results, sheet], api_visibility="private")
        model.change(show_prompt, model, prompt, api_visibility="private", **one)
    return page.queue(max_size=MAX_WAITING)


def _photo_of(uploads: Path, payload: GradioModel | None) -> Path | None:
    with _as_sentences():
        return None if payload is None else uploaded_file(uploads, payload.model_dump())


def _paint_of(uploads: Path, editor: gr.ImageEditor, payload: Any) -> np.ndarray | None:
    """Return the strength of the paint: of what gradio sends, only the layers are read."""
    if payload is None:
        return None
    # A browser sends the layers ahead, and their name here.
    painted = payload if payload.id is None else editor.blob_storage.pop(payload.id, None)
    layers = painted.layers if painted is not None else ()
    with _as_sentences():
        return paint_of(
            [
                io.BytesIO(layer)
                if isinstance(layer, bytes)
                else uploaded_file(uploads, layer.model_dump())
                for layer in layers
                if layer is not None
            ]
        )


def _refuse_addresses(component: gr.components.Component) -> None:
    """Keep visitors from having the server fetch addresses in place of an upload."""
    move = component.async_move_resource_to_block_cache

    async def move_file(path: str | Path | None) -> str | None:
        return str(path) if is_http_url_like(str(path)) else await move(path)

    component.async_move_resource_to_block_cache = move_file


def _choices(*values: Any) -> Choices:
    """Return what a visitor has set, from the values of the fields that `build` lists."""
    timestep, painted_timestep, painted, scale, prompt, color_fix, tile_px = values
    return Choices(
        round(timestep),
        round(painted_timestep),
        painted,
        scale,
        prompt or "",  # a textbox that nobody wrote in gives None
        color_fix,
        None if tile_px == "auto" else tile_px,
    )


def _told_to(
    progress: gr.Progress, stopped: set[str | None], session: str | None
) -> Callable[[float], None]:
    """Return what moves the bar, says how long it will take, and ends what its visitor stopped."""
    begin = time.monotonic()
    progress(0, desc="Restoring")

    def tell(share: float) -> None:
        left = (time.monotonic() - begin) * (1 - share) / max(share, 1e-6)
        progress(share, desc=f"Restoring, about {left:.0f} s left")

    shown = paced(tell, interval=BAR_SECONDS)

    def end_if_stopped() -> None:
        if session in stopped:
            raise gr.Error("stopped", print_exception=False)

    def report(share: float) -> None:
        end_if_stopped()
        shown(share)

    end_if_stopped()  # it may have waited for its turn
    return report


@contextmanager
def _as_sentences() -> Iterator[None]:
    """Raise what gradio shows for an error, without anything of the server's inside."""
    try:
        yield
    except gr.Error:
        raise
    except Exception as error:
        raise gr.Error(sentence_for(error), print_exception=False) from error
