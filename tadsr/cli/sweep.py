"""`tadsr sweep`: one photo at several timesteps, on one sheet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tadsr.cli import options
from tadsr.cli.devices import choose_device
from tadsr.cli.model_request import ModelRequest
from tadsr.cli.progress import ImageProgress
from tadsr.cli.reporting import (
    UsageError,
    as_usage_errors,
    check_range,
    readable_errors,
    silence_libraries,
)
from tadsr.cli.targets import check_place
from tadsr.config import UpscaleSettings

if TYPE_CHECKING:
    import numpy as np

    from tadsr.measure.regions import Box

SWEEP_HELP = """Show one photo at several timesteps.

\b
Writes a labelled sheet: the input, bicubic and each timestep, and below each a
part enlarged: where there is detail and the timesteps differ most, or --crop.
With --hq, the original, it is shown as well, figures are printed, and the
fidelity-realism curve is drawn beside the sheet (photo_sweep_curve.png).

\b
Examples:
  tadsr sweep photo.jpg                    writes photo_sweep.png
  tadsr sweep photo.jpg -o sheet.jpg -t 1,500,900
  tadsr sweep small.png --hq original.png --plot curve.svg
  tadsr sweep photo.jpg --crop 400,300,160,120
"""


def sweep(
    photo: Annotated[Path, typer.Argument(metavar="IN", help="The photo.")],
    output: options.SheetOption = None,
    timesteps: Annotated[
        str, typer.Option("--timesteps", "-t", metavar="T,T,...", help="Timesteps, 0..999 each.")
    ] = "1,100,300,500,700,900",
    hq: Annotated[Path | None, typer.Option("--hq", metavar="FILE", help="The original.")] = None,
    crop: Annotated[
        str | None,
        typer.Option(
            "--crop", metavar="X,Y,W,H", help="Part to show enlarged, in px of the result."
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Where to draw the curve, as png, svg or pdf."),
    ] = None,
    width: options.PanelWidthOption = 320,
    scale: options.ScaleOption = 4,
    prompt: options.PromptOption = None,
    tagger: options.TaggerOption = None,
    prompt_style: options.PromptStyleOption = "published",
    color_fix: options.ColorFixOption = "adain",
    process_size: options.ProcessSizeOption = None,
    model: options.ModelOption = "tadsr-tiny",
    adapter: options.AdapterOption = None,
    device: options.DeviceOption = "auto",
    dtype: options.DtypeOption = "auto",
    engine: options.EngineOption = "auto",
    tile: options.TileOption = "auto",
    max_memory: options.MaxMemoryOption = None,
    overwrite: options.OverwriteOption = False,
    debug: options.DebugOption = False,
) -> None:
    """Run `tadsr sweep`."""
    with as_usage_errors():
        tiling = options.parse_tiling(tile, max_memory)
        settings = UpscaleSettings(scale, color_fix, process_size, tiling)
        values = _parse_numbers("--timesteps", timesteps)
        corner = None if crop is None else _parse_numbers("--crop", crop, count=4)
    for value in values:
        check_range("--timesteps", value, 0, 999, "small is faithful, large is vivid")
    if len(set(values)) < len(values):
        raise UsageError(f"--timesteps must be different numbers, got {timesteps}")
    check_range("--width", width, 32, 8192, "large sheets show more")
    if plot is not None and hq is None:
        raise UsageError("--plot needs --hq, the original that fidelity is measured against")
    target = output or photo.with_name(f"{photo.stem}_sweep.png")
    if hq is not None and plot is None:
        plot = target.with_name(f"{target.stem}_curve.png")
    with readable_errors(debug):
        for path in filter(None, (target, plot)):
            check_place(path)
            if path.exists() and not overwrite:
                raise UsageError(f"{path} exists already; --overwrite replaces it")
        wanted = ModelRequest(
            model,
            adapter,
            dtype,
            prompt=prompt,
            timestep=max(values),
            tagger=tagger,
            prompt_style=prompt_style,
            engine=engine,
        )
        wanted.check()
        place = choose_device(device)

        from tadsr.images import check_writable, write_image
        from tadsr.measure.metrics import default_metrics, make_metric
        from tadsr.measure.pictures import read_rgb8, to_rgb8
        from tadsr.measure.plot import check_plot
        from tadsr.measure.plot import plot as draw_plot
        from tadsr.measure.report import format_table
        from tadsr.measure.sweep import TimestepSweep

        silence_libraries(debug)
        target.parent.mkdir(parents=True, exist_ok=True)
        check_writable(target, overwrite=overwrite)
        lq = read_rgb8(photo)
        original = None if hq is None else read_rgb8(hq)
        size = settings.output_size(*lq.shape[:2])
        with as_usage_errors():
            _check_original(original, size)
            box = None if corner is None else _box_inside(corner, size)
            metrics = [make_metric(name) for name in default_metrics(True)] if plot else []
            if plot is not None:
                check_plot(metrics, plot)
        pipe = wanted.load(place)
        with ImageProgress() as bar:
            results = pipe.sweep(
                lq, values, prompt=prompt, settings=settings, progress=bar.of(photo)
            )
        images = dict(zip(values, map(to_rgb8, results), strict=True))
        found = TimestepSweep(lq, images, original)
        if plot is not None:
            with as_usage_errors():
                figures = found.measure(metrics, model_name=wanted.name)
            typer.echo(format_table(figures))
            draw_plot(figures, plot)
        write_image(found.draw(box, panel_px=width), target, overwrite=overwrite)
        written = [str(path) for path in (target, plot) if path is not None]
        typer.echo(f"{photo} -> {', '.join(written)}")


def _parse_numbers(option: str, text: str, *, count: int | None = None) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or count not in (None, len(parts)):
        wanted = "whole numbers" if count is None else f"{count} whole numbers"
        raise ValueError(f"{option} must be {wanted} with commas between them, got {text!r}")
    return [int(part) for part in parts]


def _check_original(original: np.ndarray | None, size: tuple[int, int]) -> None:
    if original is not None and original.shape[:2] != size:
        height, width = original.shape[:2]
        raise ValueError(
            f"the original must have the result's size {size[1]}×{size[0]} px, got "
            f"{width}×{height} px; crop it or choose another --scale"
        )


def _box_inside(corner: list[int], size: tuple[int, int]) -> Box:
    from tadsr.measure.regions import Box

    left, top, width, height = corner
    box = Box(left, top, left + width, top + height)
    if not (width and height) or box.right > size[1] or box.bottom > size[0]:
        raise ValueError(
            f"--crop must lie inside the result's {size[1]}×{size[0]} px and not be empty, got "
            f"{','.join(map(str, corner))}"
        )
    return box
