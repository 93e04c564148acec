"""`tadsr upscale`: files and folders in, larger images out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tadsr.cli.plan import check_place, plan_jobs
from tadsr.cli.reporting import (
    DebugOption,
    UsageError,
    as_usage_errors,
    check_range,
    parse_bytes,
    readable_errors,
    silence_libraries,
)
from tadsr.cli.timestep_maps import (
    TimestepMapOption,
    TimestepRangeOption,
    parse_timestep_range,
    read_timestep_map,
)
from tadsr.config import ColorFix, UpscaleSettings
from tadsr.folders.jobs import Job
from tadsr.folders.manifest import fingerprint
from tadsr.folders.restoring import FileRequest

if TYPE_CHECKING:
    from tqdm import tqdm

    from tadsr.folders.outcome import Outcome
    from tadsr.folders.run import Pace, Report
    from tadsr.folders.workers import Load
    from tadsr.tiling.spec import TileSpec

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
  tadsr upscale photo.jpg --timestep-map mask.png --timestep-range 50:800
  tadsr upscale panorama.png large.png --max-memory 4GB
  tadsr upscale scan16.tif out.png         16 bit stay 16 bit
  tadsr upscale clip.gif                   all frames, as APNG: clip_x4.png

Outputs that exist are skipped, so that a stopped run goes on where it was. A run over several
images writes tadsr-manifest.jsonl into the output folder: what was made of what, with which
settings, and what failed. A file that fails is reported at the end, after all others are done.
Animations become APNG, WebP or GIF, by the output's name.
"""

Format = Literal["png", "jpg", "webp", "tiff", "avif", "bmp", "gif"]


@dataclass
class _Tally:
    """What became of the images."""

    num_written: int = 0
    num_skipped: int = 0
    failures: list[str] = field(default_factory=list)
    pace: Pace | None = None


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
    timestep_map: TimestepMapOption = None,
    timestep_range: TimestepRangeOption = None,
    scale: Annotated[
        float,
        typer.Option("--scale", "-s", metavar="X", help="Output size over input size, from 1."),
    ] = 4,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="What the pictures show, if the model reads text."),
    ] = None,
    tagger: Annotated[
        str | None,
        typer.Option(
            "--tagger",
            metavar="dape|FOLDER",
            help="Writes each picture's prompt; dape: the one beside the published model.",
        ),
    ] = None,
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
    devices: Annotated[
        str | None,
        typer.Option(
            "--devices", metavar="A,B", help="Several at once, such as 0,1 for two CUDA devices."
        ),
    ] = None,
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
    strip: Annotated[
        bool,
        typer.Option(
            "--strip", help="Drop EXIF, GPS, XMP and DPI; the ICC profile stays, for colours."
        ),
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
    if devices is not None and device != "auto":
        raise UsageError("--device and --devices must not both be given; leave one out")
    map_range = parse_timestep_range(timestep_map, timestep_range)
    request = FileRequest(settings, timestep, prompt, seed, tiling, quality, overwrite, strip)
    with readable_errors(debug):
        map_digest = None
        if timestep_map is not None:
            found, timestep = read_timestep_map(timestep_map, map_range)
            request = replace(request, timestep=found)
            map_digest = fingerprint(timestep_map)[1]
        jobs = plan_jobs(paths, output, format=format, scale=scale)
        for job in jobs:
            check_place(job.target)

        from tadsr.cli.model import choose_device, load_on, parse_devices

        silence_libraries(debug)
        places = parse_devices(devices) if devices is not None else [choose_device(device)]
        options = {"tagger": tagger, "engine": engine}
        load = partial(load_on, model, adapter, dtype, prompt, timestep, **options)
        described = {"model": model, "adapter": adapter, "dtype": dtype, "tagger": tagger}
        described |= {"timestep_map": map_digest, "timestep_range": map_range}
        tally = _upscale_all(jobs, request, described, load, places, quiet=quiet, debug=debug)
    _report(tally, len(jobs), quiet)
    if tally.failures:
        raise typer.Exit(1)


def _upscale_all(
    jobs: Sequence[Job],
    request: FileRequest,
    described: dict[str, Any],
    load: Load,
    devices: Sequence[str],
    *,
    quiet: bool,
    debug: bool,
) -> _Tally:
    from tqdm import tqdm

    from tadsr.folders.resume import upscale_files
    from tadsr.folders.run import run_files

    tally, progress = _Tally(), _Progress(quiet)
    # None: a bar on a terminal only.
    hidden = True if quiet or len(jobs) == 1 else None

    def run(todo: list[Job], report: Report) -> None:
        if len(devices) == 1:
            here = partial(load, devices[0])
            tally.pace = run_files(todo, request, here, report, progress.of)
        else:
            from tadsr.folders.workers import run_on_devices

            run_on_devices(todo, request, load, devices, report)

    with tqdm(total=len(jobs), unit="image", disable=hidden) as bar, progress:

        def report(outcome: Outcome) -> None:
            progress.close()
            job = outcome.job
            bar.update()
            bar.set_postfix_str(job.source.name)
            if outcome.note:
                _say(bar, outcome.note, quiet, err=True)
            if outcome.status == "skipped":
                tally.num_skipped += 1
                _say(bar, outcome.message, quiet, err=True)
            elif outcome.status == "failed":
                tally.failures.append(outcome.message)
                if debug:
                    _say(bar, outcome.traceback, quiet=False, err=True)
            else:
                tally.num_written += 1
                size = f"{outcome.size[0]}×{outcome.size[1]}"
                size += f", {outcome.num_frames} frames" if outcome.num_frames > 1 else ""
                line = f"{job.source} -> {job.target} ({size}, {outcome.seconds:.1f} s)"
                _say(bar, line, quiet or not bar.disable)

        upscale_files(jobs, request, described, run, report)
    return tally


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


class _Progress:
    """A bar for the image at hand, which comes only where an image takes a while."""

    def __init__(self, quiet: bool) -> None:
        self._hidden = True if quiet else None
        self._bar: tqdm | None = None

    def of(self, job: Job) -> Callable[[float], None]:
        """Begin an image."""
        self.close()
        return self._advance

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None

    def _advance(self, share: float) -> None:
        from tqdm import tqdm

        if self._bar is None and share < 1:
            form = "{l_bar}{bar}| {elapsed}<{remaining}"
            self._bar = tqdm(total=1.0, delay=2, leave=False, disable=self._hidden, bar_format=form)
        if self._bar is not None:
            self._bar.update(share - self._bar.n)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        self.close()


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
        if tally.pace is not None and tally.num_written > 1:
            typer.echo(tally.pace.described())
