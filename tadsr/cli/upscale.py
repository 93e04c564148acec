"""`tadsr upscale`: files and folders in, larger images out."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tadsr.cli import options
from tadsr.cli.devices import choose_device, split_devices
from tadsr.cli.model_request import ModelRequest
from tadsr.cli.progress import ImageProgress
from tadsr.cli.reporting import (
    UsageError,
    as_usage_errors,
    check_range,
    interrupted_by_sigterm,
    readable_errors,
    silence_libraries,
)
from tadsr.cli.streams import standard_streams
from tadsr.cli.tally import Tally, print_tally, rate_text
from tadsr.cli.targets import (
    FORMAT_SUFFIXES,
    check_lossless,
    check_places,
    plan_jobs,
    say_plan,
)
from tadsr.cli.timestep_maps import (
    TimestepMapOption,
    TimestepRangeOption,
    parse_timestep_range,
    read_timestep_map,
)
from tadsr.config import UpscaleSettings
from tadsr.errors import ImageReadWarning
from tadsr.folders.jobs import Job
from tadsr.folders.manifest import fingerprint
from tadsr.folders.restoring import FileRequest

if TYPE_CHECKING:
    from tqdm import tqdm

    from tadsr.folders.outcome import Outcome
    from tadsr.folders.run import Report
    from tadsr.folders.workers import Load
    from tadsr.restorer import Restorer

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
  tadsr upscale scan16.tif out.png         16 bit stays 16 bit
  tadsr upscale clip.gif                   all frames, as APNG: clip_x4.png

Existing outputs are skipped, so a stopped run continues where it was. A run over several images
records what was made of what, with which settings, and what failed, in tadsr-manifest.jsonl in the
output folder. Files that fail are reported at the end, after all others are done. Animations become
APNG, WebP or GIF, depending on the output's name.
"""


@dataclass(frozen=True)
class _Run:
    """Everything about a run but its images."""

    request: FileRequest
    described: dict[str, Any]
    wanted: ModelRequest
    devices: Sequence[str]
    """Names as they were typed."""
    is_locked: bool
    shown: Callable[[str], str]
    """What a line says of files that stand for standard streams."""
    quiet: bool
    verbose: bool
    debug: bool


def upscale(
    paths: Annotated[
        list[str], typer.Argument(metavar="IN", help="Image files or folders; the last may be OUT.")
    ],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="OUT", help="File or folder to write to."),
    ] = None,
    timestep: options.TimestepOption = None,
    timestep_map: TimestepMapOption = None,
    timestep_range: TimestepRangeOption = None,
    scale: options.ScaleOption = 4,
    width: options.WidthOption = None,
    height: options.HeightOption = None,
    long_side: options.LongSideOption = None,
    short_side: options.ShortSideOption = None,
    prompt: options.PromptOption = None,
    tagger: options.TaggerOption = None,
    prompt_style: options.PromptStyleOption = "published",
    color_fix: options.ColorFixOption = "adain",
    process_size: options.ProcessSizeOption = None,
    seamless: options.SeamlessOption = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", metavar="N", help="Sample at random instead of taking the likeliest result."
        ),
    ] = None,
    model: options.ModelOption = "tadsr-tiny",
    adapter: options.AdapterOption = None,
    lora: options.LoraOption = None,
    device: options.DeviceOption = "auto",
    devices: options.DevicesOption = None,
    dtype: options.DtypeOption = "auto",
    engine: options.EngineOption = "auto",
    tile: options.TileOption = "auto",
    max_memory: options.MaxMemoryOption = None,
    max_pixels: options.MaxPixelsOption = None,
    format: options.FormatOption = None,
    quality: Annotated[
        int | None,
        typer.Option(
            "--quality",
            metavar="1..100",
            help="Quality of JPEG (95 by default), WebP and AVIF (90).",
        ),
    ] = None,
    lossless: Annotated[
        bool, typer.Option("--lossless", help="Write lossless WebP; refused for formats that lose.")
    ] = False,
    keep_dates: Annotated[
        bool, typer.Option("--keep-dates", help="Give results their inputs' file dates.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be made, without making it.")
    ] = False,
    suffix: Annotated[
        str | None,
        typer.Option(
            "--suffix", metavar="TEXT", help="Add this to the name of every output, such as _sharp."
        ),
    ] = None,
    background: Annotated[
        str | None,
        typer.Option(
            "--background",
            metavar="COLOR",
            help="Put transparent pictures on a colour: white, #204060.",
        ),
    ] = None,
    overwrite: options.OverwriteOption = False,
    strip: Annotated[
        bool,
        typer.Option(
            "--strip", help="Drop EXIF, GPS, XMP and DPI; the ICC profile stays, for colours."
        ),
    ] = False,
    is_locked: Annotated[
        bool,
        typer.Option(
            "--lock/--no-lock", help="Whether to keep other runs out of the output folder."
        ),
    ] = True,
    quiet: options.QuietOption = False,
    verbose: options.VerboseOption = False,
    debug: options.DebugOption = False,
) -> None:
    """Run `tadsr upscale`."""
    with as_usage_errors():
        tiling = options.parse_tiling(tile, max_memory)
        settings = UpscaleSettings(scale, color_fix, process_size, tiling, seamless)
        limit = options.parse_max_pixels(max_pixels)
        size, size_tag = options.parse_size(width, height, long_side, short_side)
        loras = tuple(options.parse_lora(text) for text in lora or ())
        color = None if background is None else options.parse_color(background)
    if suffix is not None and set(suffix) & set("/\\\0"):
        raise UsageError(f"--suffix must be part of a file's name, got {suffix!r}")
    check_range("--timestep", timestep, 0, 999, "small is faithful, large is vivid")
    check_range("--quality", quality, 1, 100, "small makes small files")
    # torch takes seeds of 64 bits.
    check_range("--seed", seed, 0, 2**63 - 1, "any number will do")
    if devices is not None and device != "auto":
        raise UsageError("--device and --devices must not both be given; leave one out")
    names = split_devices(devices or device)
    if timestep is not None and timestep_map is not None:
        raise UsageError("--timestep and --timestep-map must not both be given; leave one out")
    map_range = parse_timestep_range(timestep_map, timestep_range)
    request = FileRequest(
        settings,
        size,
        timestep,
        prompt,
        seed,
        quality,
        is_lossless=lossless,
        keeps_dates=keep_dates,
        overwrite=overwrite,
        strip=strip,
        background=color,
        max_pixels=limit,
    )
    if size is not None and scale != 4:
        raise UsageError("--scale and a size in px must not both be given; leave one out")
    stream_suffix = FORMAT_SUFFIXES.get(format or "png", FORMAT_SUFFIXES["png"])[0]
    with (
        readable_errors(debug),
        interrupted_by_sigterm(),
        standard_streams(paths, output, stream_suffix) as (inputs, place, shown),
    ):
        silence_libraries(debug, quiet)
        map_digest = None
        if timestep_map is not None:
            found, timestep = read_timestep_map(timestep_map, map_range)
            request = replace(request, timestep=found)
            map_digest = fingerprint(timestep_map)[1]
        say = partial(typer.echo, err=True) if not quiet else lambda line: None
        is_streamed = place is not None and shown(place) != place
        naming = {"scale": scale, "own_tag": size_tag or None, "tag": suffix, "say": say}
        jobs = check_places(plan_jobs(inputs, place, format=format, **naming))
        check_lossless(jobs, lossless)
        if dry_run:
            say_plan(jobs, request, lambda line: typer.echo(shown(line)))
            return
        _set_warnings(debug, quiet)
        wanted = ModelRequest(
            model,
            adapter,
            dtype,
            prompt=prompt,
            timestep=timestep,
            tagger=tagger,
            prompt_style=prompt_style,
            engine=engine,
            loras=loras,
        )
        wanted.check()
        if overwrite or not all(os.path.lexists(job.target) for job in jobs):
            _choose_devices(names)
        described = {"model": model, "adapter": adapter, "dtype": dtype, "tagger": tagger}
        described |= {
            "prompt_style": prompt_style,
            "timestep_map": map_digest,
            "timestep_range": map_range,
        }
        if loras:
            described["loras"] = [
                [fingerprint(Path(file))[1], strength] for file, strength in loras
            ]
        quiet = quiet or is_streamed  # standard output is the picture's
        run = _Run(request, described, wanted, names, is_locked, shown, quiet, verbose, debug)
        tally = _upscale_all(jobs, run)
        print_tally(tally, len(jobs), quiet)
        if tally.failures:
            raise typer.Exit(1)


def _upscale_all(jobs: Sequence[Job], run: _Run) -> Tally:
    from tqdm import tqdm

    from tadsr.folders.resume import upscale_files
    from tadsr.folders.run import run_files

    request, quiet, debug = run.request, run.quiet, run.debug
    shown = run.shown
    tally, progress = Tally(), ImageProgress(quiet)
    # None: a bar on a terminal only.
    hidden = True if quiet or len(jobs) == 1 else None

    def load_here(device: str) -> Restorer:
        pipe = run.wanted.load(device)
        progress.close()
        if not quiet:
            from tadsr.cli.model import describe, memory_remark

            _say(bar, describe(pipe, reasons=run.verbose), quiet, err=True)
            remark = memory_remark(pipe, request.settings.tiling)
            if remark is not None:
                _say(bar, remark, quiet, err=True)
        return pipe

    def work(todo: list[Job], report: Report) -> None:
        progress.wait_for(f"loading {run.wanted.source}")
        devices = _choose_devices(run.devices)
        if len(devices) == 1:
            here = partial(load_here, devices[0])
            tally.pace = run_files(todo, request, here, report, progress.of)
        else:
            from tadsr.folders.workers import run_on_devices

            progress.close()
            _say(bar, f"on {', '.join(devices)}", quiet, err=True)
            in_worker = partial(_load_in_worker, run.wanted.load, debug, quiet)
            tally.pace = run_on_devices(todo, request, in_worker, devices, report)

    with tqdm(total=len(jobs), unit="image", disable=hidden) as bar, progress:

        def report(outcome: Outcome) -> None:
            progress.close()
            job = outcome.job
            bar.update()
            bar.set_postfix_str(job.source.name)
            if outcome.note:
                _say(bar, shown(outcome.note), quiet, err=True)
            if outcome.status == "skipped":
                tally.num_skipped += 1
                _say(bar, shown(outcome.message), quiet, err=True)
            elif outcome.status == "failed":
                tally.failures.append(shown(outcome.message))
                if debug:
                    _say(bar, outcome.traceback, quiet=False, err=True)
            else:
                tally.num_written += 1
                size = f"{outcome.size[0]}×{outcome.size[1]}"
                size += f", {outcome.num_frames} frames" if outcome.num_frames > 1 else ""
                megapixels = outcome.size[0] * outcome.size[1] * outcome.num_frames / 1e6
                tally.megapixels += megapixels
                rate = f"{outcome.seconds:.1f} s, {rate_text(outcome.seconds / megapixels)}"
                line = f"{job.source} -> {job.target} ({size}, {rate})"
                _say(bar, shown(line), quiet or not bar.disable)

        upscale_files(jobs, request, run.described, work, report, is_locked=run.is_locked)
    return tally


def _choose_devices(names: Sequence[str]) -> list[str]:
    return [str(choose_device(name)) for name in names]


def _load_in_worker(load: Load, debug: bool, quiet: bool, device: str) -> Restorer:
    _set_warnings(debug, quiet)
    return load(device)


def _set_warnings(debug: bool, quiet: bool) -> None:
    silence_libraries(debug, quiet)
    # The outcome of each image has a note that says the same.
    warnings.simplefilter("ignore", ImageReadWarning)


def _say(bar: tqdm, message: str, quiet: bool, *, err: bool = False) -> None:
    if not quiet:
        with bar.external_write_mode():
            typer.echo(message, err=err)
