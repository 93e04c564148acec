"""`tadsr upscale`: files and folders in, larger images out."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from tadsr.cli import options
from tadsr.cli.console import Console
from tadsr.cli.model import DtypeName, ModelRequest, choose_device, split_devices
from tadsr.cli.reporting import (
    UsageError,
    as_usage_errors,
    interrupted_by_sigterm,
    silence_libraries,
)
from tadsr.cli.targets import (
    FORMAT_SUFFIXES,
    check_lossless,
    check_places,
    plan_jobs,
    say_plan,
    standard_streams,
)
from tadsr.config import ColorFix, EngineName, Seamless, UpscaleSettings
from tadsr.errors import ImageReadWarning
from tadsr.folders.jobs import Job
from tadsr.folders.manifest import fingerprint
from tadsr.folders.restoring import FileRequest
from tadsr.heap import keep_freed_memory
from tadsr.tile_spec import TileSpec

if TYPE_CHECKING:
    from tadsr.folders.run import Report
    from tadsr.folders.workers import Load
    from tadsr.restorer import Restorer

_MANY_IMAGES = 50
"""From so many images on, an engine that is slow to load pays on a CPU."""


def upscale(
    paths: list[str] = options.argument("IN", "Image files or folders; the last may be OUT."),
    output: str | None = options.option(None, "--output -o OUT", "File or folder to write to."),
    timestep: int | None = options.TIMESTEP,
    timestep_map: Path | None = options.TIMESTEP_MAP,
    timestep_range: str | None = options.TIMESTEP_RANGE,
    scale: float = options.SCALE,
    width: int | None = options.WIDTH,
    height: int | None = options.HEIGHT,
    long_side: int | None = options.LONG_SIDE,
    short_side: int | None = options.SHORT_SIDE,
    prompt: str | None = options.PROMPT,
    tagger: str | None = options.TAGGER,
    prompt_style: Literal["published", "training"] = options.PROMPT_STYLE,
    color_fix: ColorFix = options.COLOR_FIX,
    process_size: int | None = options.PROCESS_SIZE,
    seamless: Seamless | None = options.SEAMLESS,
    seed: int | None = options.option(
        None,
        "--seed N",
        "Sample at random instead of taking the likeliest result.",
        callback=options.SEED_RANGE,
    ),
    model: str = options.MODEL,
    adapter: str | None = options.ADAPTER,
    lora: list[str] | None = options.LORA,
    device: str = options.DEVICE,
    devices: str | None = options.DEVICES,
    dtype: DtypeName = options.DTYPE,
    engine: EngineName = options.ENGINE,
    tile: str = options.TILE,
    max_memory: str | None = options.MAX_MEMORY,
    max_pixels: int = options.MAX_PIXELS_READ,
    format: str | None = options.FORMAT,
    quality: int | None = options.option(
        None,
        "--quality 1..100",
        "Quality of JPEG (95 by default), WebP and AVIF (90).",
        callback=options.within(1, 100, "small makes small files"),
    ),
    lossless: bool = options.option(
        False, "--lossless", "Write lossless WebP; refused for formats that lose."
    ),
    keep_dates: bool = options.option(
        False, "--keep-dates", "Give results their inputs' file dates."
    ),
    dry_run: bool = options.option(
        False, "--dry-run", "Say what would be made, without making it."
    ),
    suffix: str | None = options.option(
        None, "--suffix TEXT", "Add this to the name of every output, such as _sharp."
    ),
    background: str | None = options.option(
        None,
        "--background COLOR",
        "Put transparent pictures on a colour: white, #204060.",
        parser=options.parse_color,
    ),
    overwrite: bool = options.OVERWRITE,
    strip: bool = options.option(
        False, "--strip", "Drop EXIF, GPS, XMP and DPI; the ICC profile stays, for colours."
    ),
    is_locked: bool = options.option(
        True, "--lock/--no-lock", "Whether to keep other runs out of the output folder."
    ),
    quiet: bool = options.QUIET,
    verbose: bool = options.VERBOSE,
    debug: bool = options.DEBUG,
) -> None:
    """Enlarge and restore images.

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

    Existing outputs are skipped, so a stopped run continues where it was. A run over several
    images records what was made of what, with which settings, and what failed, in
    tadsr-manifest.jsonl in the output folder. Files that fail are reported at the end, after all
    others are done. Animations become APNG, WebP or GIF, depending on the output's name.
    """
    with as_usage_errors():
        tiling = options.parse_tiling(tile, max_memory)
        settings = UpscaleSettings(scale, color_fix, process_size, tiling, seamless)
        size, size_tag = options.parse_size(width, height, long_side, short_side)
    if suffix is not None and set(suffix) & set("/\\\0"):
        raise UsageError(f"--suffix must be part of a file's name, got {suffix!r}")
    for first, second, are_both in (
        ("--device", "--devices", devices is not None and device != "auto"),
        ("--timestep", "--timestep-map", timestep is not None and timestep_map is not None),
        ("--scale", "a size in px", size is not None and scale != 4),
    ):
        if are_both:
            raise UsageError(f"{first} and {second} must not both be given; leave one out")
    names = split_devices(devices or device)
    map_range = options.parse_timestep_range(timestep_map, timestep_range)
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
        background=background,
        max_pixels=max_pixels,
    )
    stream_suffix = FORMAT_SUFFIXES.get(format or "png", FORMAT_SUFFIXES["png"])[0]
    with (
        interrupted_by_sigterm(),
        standard_streams(paths, output, stream_suffix) as (inputs, place, shown),
    ):
        if timestep_map is not None:
            found, timestep = options.read_timestep_map(timestep_map, map_range)
            request = replace(request, timestep=found)
        say = partial(typer.echo, err=True) if not quiet else lambda line: None
        naming = {"scale": scale, "own_tag": size_tag or None, "tag": suffix, "say": say}
        jobs = check_places(plan_jobs(inputs, place, format=format, **naming))
        check_lossless(jobs, lossless)
        if dry_run:
            say_plan(jobs, request, lambda line: typer.echo(shown(line)))
            return
        # The outcome of each image has a note that says the same.
        warnings.simplefilter("ignore", ImageReadWarning)
        wanted = ModelRequest(
            model,
            adapter,
            dtype,
            prompt=prompt,
            timestep=timestep,
            tagger=tagger,
            prompt_style=prompt_style,
            engine=engine,
            loras=tuple(lora or ()),
        )
        wanted.check()
        if overwrite or not all(os.path.lexists(job.target) for job in jobs):
            _choose_devices(names)
        described = {"model": model, "adapter": adapter, "dtype": dtype, "tagger": tagger}
        described["prompt_style"] = prompt_style
        described["timestep_map"] = timestep_map and fingerprint(timestep_map)[1]
        described["timestep_range"] = map_range
        if lora:
            described["loras"] = [[fingerprint(Path(file))[1], strength] for file, strength in lora]
        from tadsr.folders.upscale import upscale_files

        # Standard output may be the picture's.
        is_streamed = place is not None and shown(place) != place
        with Console(len(jobs), shown, quiet or is_streamed, debug) as console:
            restore = partial(_restore, wanted, names, console, verbose, request)
            upscale_files(jobs, request, described, restore, console.add, is_locked=is_locked)
        console.finish()


def _restore(
    wanted: ModelRequest,
    names: Sequence[str],
    console: Console,
    verbose: bool,
    request: FileRequest,
    jobs: list[Job],
    report: Report,
) -> None:
    """Load the model and restore what is left of a run."""
    console.progress.wait_for(f"loading {wanted.source}")
    wanted = replace(wanted, is_for_many=len(jobs) >= _MANY_IMAGES)
    devices = _choose_devices(names)
    # The first image takes its memory in any case.
    is_kept = len(jobs) > 1 and not isinstance(request.settings.tiling, TileSpec)
    if len(devices) > 1:
        from tadsr.folders.workers import run_on_devices

        console.say(f"on {', '.join(devices)}")
        load = partial(_load_in_worker, wanted.load, console.debug, console.quiet, is_kept)
        console.pace = run_on_devices(jobs, request, load, devices, report)
        return
    from tadsr.folders.run import run_files

    def load_here() -> Restorer:
        from tadsr.cli.model import describe, memory_remark

        _keep_memory(is_kept, devices[0])
        pipe = wanted.load(devices[0])
        console.progress.close()
        if not console.quiet:
            console.say(describe(pipe, reasons=verbose))
            console.say(memory_remark(pipe, request.settings.tiling) or "")
        return pipe

    console.pace = run_files(jobs, request, load_here, report, console.progress.of)


def _choose_devices(names: Sequence[str]) -> list[str]:
    return [str(choose_device(name)) for name in names]


def _keep_memory(is_kept: bool, device: str) -> None:
    if is_kept and device == "cpu":
        keep_freed_memory()


def _load_in_worker(load: Load, debug: bool, quiet: bool, is_kept: bool, device: str) -> Restorer:
    _keep_memory(is_kept, device)
    silence_libraries(debug, quiet)
    warnings.simplefilter("ignore", ImageReadWarning)
    return load(device)
