"""`tadsr upscale`: files and folders in, larger images out."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tadsr.cli.plan import Job, check_place, plan_jobs
from tadsr.cli.reporting import (
    READABLE_ERRORS,
    DebugOption,
    as_usage_errors,
    check_range,
    parse_bytes,
    readable_errors,
    silence_libraries,
)
from tadsr.config import ColorFix, UpscaleSettings

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from tqdm import tqdm

    from tadsr.pipeline import TADSRPipeline
    from tadsr.tiling.spec import TileSpec

STREAMED_PIXELS = 2**26
"""Results with more pixels are written strip by strip, where their format can."""

UPSCALE_HELP = """Enlarge and restore images.

\b
IN is one or more image files or folders. OUT is the last path if there are
several and it is a folder, ends with "/", or does not exist yet; otherwise
name it with -o. An existing file is never replaced without --overwrite.

\b
Examples:
  tadsr upscale photo.jpg                  writes photo_x4.png beside it
  tadsr upscale photo.jpg sharp.png        writes sharp.png
  tadsr upscale a.jpg b.jpg sharp/         writes sharp/a.png, sharp/b.png
  tadsr upscale a.jpg b.jpg -o sharp/      the same
  tadsr upscale photos/                    mirrors the tree into photos_x4/
  tadsr upscale photos/ sharp/ -t 900      into sharp/, more vivid
  tadsr upscale scan.tif out.tif -s 2      twice as large
  tadsr upscale panorama.png large.png --max-memory 4GB

Outputs that exist are skipped, so that a stopped run goes on where it was. A file that fails
is reported at the end, after all others are done.
"""

Format = Literal["png", "jpg", "webp", "tiff", "avif", "bmp"]


@dataclass(frozen=True)
class _Request:
    """What is done to every image."""

    settings: UpscaleSettings
    timestep: int
    prompt: str
    seed: int | None
    tiling: TileSpec | Literal["auto"] | None
    quality: int | None
    overwrite: bool
    debug: bool


@dataclass
class _Tally:
    """What became of the images."""

    num_written: int = 0
    num_skipped: int = 0
    failures: list[str] = field(default_factory=list)


def upscale(
    paths: Annotated[
        list[str], typer.Argument(metavar="IN", help="Image files or folders, then perhaps OUT.")
    ],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="OUT", help="File or folder to write to."),
    ] = None,
    timestep: Annotated[
        int,
        typer.Option(
            "--timestep", "-t", metavar="0..999", help="Small is faithful, large is vivid."
        ),
    ] = 500,
    scale: Annotated[
        float,
        typer.Option("--scale", "-s", metavar="X", help="Output size over input size, from 1."),
    ] = 4,
    prompt: Annotated[
        str,
        typer.Option("--prompt", "-p", help="What the pictures show, if the model reads text."),
    ] = "",
    color_fix: Annotated[
        ColorFix, typer.Option("--color-fix", help="How the input's colours are kept.")
    ] = "adain",
    process_size: Annotated[
        int,
        typer.Option(
            "--process-size", metavar="PX", help="Smallest side the network works at; 0: any."
        ),
    ] = 512,
    seed: Annotated[
        int | None,
        typer.Option("--seed", metavar="N", help="Sample instead of taking the likeliest result."),
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="Built-in model, folder, or hub id owner/name.")
    ] = "tadsr-tiny",
    adapter: Annotated[
        str | None,
        typer.Option("--adapter", metavar="FILE", help="tadsr.pkl, if not in the model's folder."),
    ] = None,
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1 or mps.")
    ] = "auto",
    dtype: Annotated[
        Literal["auto", "fp32", "fp16", "bf16"],
        typer.Option("--dtype", help="Precision; auto: fp16 on CUDA, else fp32."),
    ] = "auto",
    engine: Annotated[
        Literal["auto", "fused", "eager", "compile"],
        typer.Option("--engine", help="How the networks are run; auto is the fastest."),
    ] = "auto",
    tile: Annotated[
        str,
        typer.Option(
            "--tile",
            metavar="auto|off|PX",
            help="Whether large images are computed in pieces; PX: how far a piece looks.",
        ),
    ] = "auto",
    max_memory: Annotated[
        str | None,
        typer.Option(
            "--max-memory", metavar="SIZE", help="Memory to stay within, such as 6GB or 500MB."
        ),
    ] = None,
    format: Annotated[
        Format | None,
        typer.Option("--format", "-f", help="Of outputs that are not named; png if left out."),
    ] = None,
    quality: Annotated[
        int | None,
        typer.Option("--quality", metavar="1..100", help="Of JPEG (95), WebP and AVIF (90)."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace outputs that exist.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    debug: DebugOption = False,
) -> None:
    """Run `tadsr upscale`."""
    with as_usage_errors():
        settings = UpscaleSettings(scale, color_fix, process_size)
        tiling = _parse_tiling(tile, max_memory)
    check_range("--timestep", timestep, 0, 999, "small is faithful, large is vivid")
    check_range("--quality", quality, 1, 100, "small makes small files")
    # torch takes seeds of 64 bits.
    check_range("--seed", seed, 0, 2**63 - 1, "any number will do")
    request = _Request(settings, timestep, prompt, seed, tiling, quality, overwrite, debug)
    with readable_errors(debug):
        jobs = plan_jobs(paths, output, format=format, scale=scale)
        for job in jobs:
            check_place(job.target)

        from tadsr.cli.model import choose_device, load_model

        silence_libraries(debug)
        place = choose_device(device)

        def load() -> TADSRPipeline:
            return load_model(
                model,
                adapter=adapter,
                device=place,
                dtype=dtype,
                engine=engine,
                prompt=prompt,
                timestep=timestep,
            )

        tally = _upscale_all(jobs, request, load, quiet)
    _report(tally, len(jobs), quiet)
    if tally.failures:
        raise typer.Exit(1)


def _upscale_all(
    jobs: Sequence[Job], request: _Request, load: Callable[[], TADSRPipeline], quiet: bool
) -> _Tally:
    from tqdm import tqdm

    tally, pipe = _Tally(), None
    # None: a bar on a terminal only.
    hidden = True if quiet or len(jobs) == 1 else None
    with tqdm(jobs, unit="image", disable=hidden) as bar:
        for job in bar:
            bar.set_postfix_str(job.source.name)
            progress = _ImageProgress(quiet)
            if job.target.exists() and not request.overwrite:
                tally.num_skipped += 1
                _say(
                    bar, f"{job.target}: exists, skipped; --overwrite replaces it", quiet, err=True
                )
                continue
            started = time.perf_counter()
            image = None
            with _collecting(job, tally, request.debug):
                image = _open(job, request)
            if image is None:
                continue
            # Outside: without a model there is no point in trying the next file. Not before the
            # first file: a run that has nothing to do loads nothing.
            pipe = pipe or load()
            with _collecting(job, tally, request.debug):
                with progress:
                    width, height = _run(pipe, image, job, request, progress)
                tally.num_written += 1
                seconds = time.perf_counter() - started
                size = f"{width}×{height}"
                is_noise = quiet or not bar.disable
                _say(bar, f"{job.source} -> {job.target} ({size}, {seconds:.1f} s)", is_noise)
    return tally


def _open(job: Job, request: _Request) -> Image.Image:
    """Read an image and check that its result can be written, before the long computation."""
    from tadsr.image_io import check_writable, read_image

    image = read_image(job.source)
    height, width = request.settings.output_size(image.height, image.width)
    job.target.parent.mkdir(parents=True, exist_ok=True)
    check_writable(job.target, has_alpha=image.has_transparency_data, size=(width, height))
    return image


def _run(
    pipe: TADSRPipeline,
    image: Image.Image,
    job: Job,
    request: _Request,
    progress: Callable[[float], None],
) -> tuple[int, int]:
    """Upscale an image to its target and return the result's width and height."""
    from tadsr.image_io import STREAMED_SUFFIXES, write_image

    settings = request.settings
    options = {
        "scale": settings.scale,
        "prompt": request.prompt,
        "color_fix": settings.color_fix,
        "process_size": settings.process_size,
        "tiling": request.tiling,
        "generator": _generator(request.seed),
        "progress": progress,
    }
    height, width = settings.output_size(image.height, image.width)
    is_streamed = job.target.suffix.lower() in STREAMED_SUFFIXES
    if height * width > STREAMED_PIXELS and is_streamed:
        pipe.upscale_to_file(
            image, job.target, request.timestep, overwrite=request.overwrite, **options
        )
    else:
        result = pipe(image, request.timestep, **options)
        write_image(result, job.target, quality=request.quality, overwrite=request.overwrite)
    return width, height


def _parse_tiling(tile: str, max_memory: str | None) -> TileSpec | Literal["auto"] | None:
    """Turn `--tile` and `--max-memory` into the pipeline's `tiling`."""
    if tile not in ("auto", "off") and not tile.isdecimal():
        raise ValueError(f"--tile must be auto, off or a number of px, got {tile!r}")
    if tile == "off" and max_memory is not None:
        raise ValueError("--max-memory needs pieces; leave --tile off out")
    if tile == "off":
        return None
    if tile == "auto" and max_memory is None:
        return "auto"
    from tadsr.tiling.spec import TileSpec

    num_bytes = None if max_memory is None else parse_bytes(max_memory)
    return TileSpec(max_memory=num_bytes, attention_px=None if tile == "auto" else int(tile))


class _ImageProgress:
    """A bar for one image, which comes only where an image takes a while."""

    def __init__(self, quiet: bool) -> None:
        self._hidden = True if quiet else None
        self._bar: tqdm | None = None

    def __call__(self, share: float) -> None:
        from tqdm import tqdm

        if self._bar is None and share < 1:
            form = "{l_bar}{bar}| {elapsed}<{remaining}"
            self._bar = tqdm(total=1.0, delay=2, leave=False, disable=self._hidden, bar_format=form)
        if self._bar is not None:
            self._bar.update(share - self._bar.n)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _generator(seed: int | None) -> torch.Generator | None:
    """Start anew for each image, so that its result does not depend on the others."""
    import torch

    return None if seed is None else torch.Generator().manual_seed(seed)


@contextmanager
def _collecting(job: Job, tally: _Tally, debug: bool) -> Iterator[None]:
    """Note what goes wrong with one image, for the others to go on."""
    try:
        yield
    # torch raises RuntimeError where memory runs out, among other things.
    except (*READABLE_ERRORS, RuntimeError, MemoryError) as error:
        if debug:
            typer.echo(traceback.format_exc(), err=True)
        message = str(error) or type(error).__name__
        if isinstance(error, MemoryError) or ("memory" in message and "alloc" in message):
            message = f"{message.splitlines()[0]}; try --max-memory, a smaller --scale or --dtype"
        names = (str(job.source), str(job.target))
        is_named = message.startswith(names)
        tally.failures.append(message if is_named else f"{job.source}: {message}")


def _say(bar: tqdm, message: str, quiet: bool, *, err: bool = False) -> None:
    if not quiet:
        with bar.external_write_mode():
            typer.echo(message, err=err)


def _report(tally: _Tally, num_jobs: int, quiet: bool) -> None:
    if num_jobs == 1:
        for failure in tally.failures:
            typer.echo(f"Error: {failure}", err=True)
        return
    if tally.failures:
        typer.echo(f"Error: {len(tally.failures)} of {num_jobs} images failed:", err=True)
        for failure in tally.failures:
            typer.echo(f"  {failure}", err=True)
    if not quiet:
        counts = f"{tally.num_written} written, {tally.num_skipped} skipped"
        typer.echo(f"{counts}, {len(tally.failures)} failed")
