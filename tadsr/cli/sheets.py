"""`tadsr sweep` and `tadsr compare`: pictures side by side on a sheet, with figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from tadsr.cli import options
from tadsr.cli.console import ImageProgress
from tadsr.cli.model import DtypeName, ModelRequest, choose_device
from tadsr.cli.reporting import UsageError, align, as_usage_errors, check_range
from tadsr.cli.targets import check_place
from tadsr.config import ColorFix, EngineName, UpscaleSettings

if TYPE_CHECKING:
    from tadsr.measure.regions import Box


def sweep(
    photo: Path = options.argument("IN", "The photo."),
    output: Path | None = options.SHEET,
    timesteps: str = options.option(
        "1,100,300,500,700,900", "--timesteps -t T,T,...", "Timesteps, 0..999 each."
    ),
    hq: Path | None = options.option(None, "--hq FILE", "The original."),
    crop: str | None = options.option(
        None, "--crop X,Y,W,H", "Part to show enlarged, in px of the result."
    ),
    plot: Path | None = options.option(
        None, "--plot FILE", "Where to draw the curve, as png, svg or pdf."
    ),
    width: int = options.PANEL_WIDTH,
    scale: float = options.SCALE,
    prompt: str | None = options.PROMPT,
    tagger: str | None = options.TAGGER,
    prompt_style: Literal["published", "training"] = options.PROMPT_STYLE,
    color_fix: ColorFix = options.COLOR_FIX,
    process_size: int | None = options.PROCESS_SIZE,
    model: str = options.MODEL,
    adapter: str | None = options.ADAPTER,
    device: str = options.DEVICE,
    dtype: DtypeName = options.DTYPE,
    engine: EngineName = options.ENGINE,
    tile: str = options.TILE,
    max_memory: str | None = options.MAX_MEMORY,
    overwrite: bool = options.OVERWRITE,
    debug: bool = options.DEBUG,
) -> None:
    """Show one photo at several timesteps.

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
    with as_usage_errors():
        tiling = options.parse_tiling(tile, max_memory)
        settings = UpscaleSettings(scale, color_fix, process_size, tiling)
    values = _parse_numbers("--timesteps", timesteps)
    corner = None if crop is None else _parse_numbers("--crop", crop, count=4)
    for value in values:
        check_range("--timesteps", value, 0, 999, "small is faithful, large is vivid")
    if len(set(values)) < len(values):
        raise UsageError(f"--timesteps must be different numbers, got {timesteps}")
    if plot is not None and hq is None:
        raise UsageError("--plot needs --hq, the original that fidelity is measured against")
    target = output or photo.with_name(f"{photo.stem}_sweep.png")
    if hq is not None and plot is None:
        plot = target.with_name(f"{target.stem}_curve.png")
    written = [path for path in (target, plot) if path is not None]
    for path in written:
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

    target.parent.mkdir(parents=True, exist_ok=True)
    check_writable(target, overwrite=overwrite)
    lq = read_rgb8(photo)
    original = None if hq is None else read_rgb8(hq)
    size = settings.output_size(*lq.shape[:2])
    if original is not None and original.shape[:2] != size:
        raise UsageError(
            f"the original must have the result's size {size[1]}×{size[0]} px, got "
            f"{original.shape[1]}×{original.shape[0]} px; crop it or choose another --scale"
        )
    box = None if corner is None else _box_inside(corner, size)
    with as_usage_errors():
        metrics = [make_metric(name) for name in default_metrics(True)] if plot else []
        if plot is not None:
            check_plot(metrics, plot)
    pipe = wanted.load(place)
    with ImageProgress() as bar:
        results = pipe.sweep(lq, values, prompt=prompt, settings=settings, progress=bar.of(photo))
    found = TimestepSweep(lq, dict(zip(values, map(to_rgb8, results), strict=True)), original)
    if plot is not None:
        with as_usage_errors():
            figures = found.measure(metrics, model_name=wanted.name)
        typer.echo(format_table(figures))
        draw_plot(figures, plot)
    write_image(found.draw(box, panel_px=width), target, overwrite=overwrite)
    typer.echo(f"{photo} -> {', '.join(map(str, written))}")


def compare(
    a: Path = options.argument("A", "A picture."),
    b: Path = options.argument("B", "Another of the same size."),
    hq: Path | None = options.argument("HQ", "The original of both.", None),
    output: Path | None = options.SHEET,
    border: int = options.BORDER,
    width: int = options.PANEL_WIDTH,
    overwrite: bool = options.OVERWRITE,
    debug: bool = options.DEBUG,
) -> None:
    """Compare two pictures, and both with an original.

    \b
    Prints PSNR and SSIM, and writes a sheet: the pictures side by side, their
    absolute differences (amplified by the factor that the label states), and below
    each the part where A and B differ most. The framed part is shown enlarged.

    \b
    Examples:
      tadsr compare a.png b.png                writes a_vs_b.png
      tadsr compare a.png b.png hq.png         both against the original as well
      tadsr compare a.png b.png -o sheet.jpg --width 600

    The pictures must have one size. They are compared as they are seen: turned into sRGB of 8 bit
    by their ICC profiles, over white.
    """
    target = output or a.with_name(f"{a.stem}_vs_{b.stem}.png")
    check_place(target)
    from tadsr.images import check_writable, write_image
    from tadsr.measure.compare import compare_images, draw_comparison
    from tadsr.measure.pictures import read_rgb8

    if target.parent.is_dir():
        check_writable(target, overwrite=overwrite)
    paths = [path for path in (a, b, hq) if path is not None]
    images = [read_rgb8(path) for path in paths]
    with as_usage_errors():
        found = compare_images(*images, names=_short_names(paths), border_px=border)
    columns = list(next(iter(found.figures.values())))
    rows = [["", *(f"{name} ↑" for name in columns)]]
    for (first, second), values in found.figures.items():
        rows.append([f"{first} – {second}", *(f"{values[name]:.4f}" for name in columns)])
    typer.echo(align(rows))
    target.parent.mkdir(parents=True, exist_ok=True)
    sheet = draw_comparison(found, *images, panel_px=width)
    write_image(sheet, target, overwrite=overwrite)
    if (images[0] == images[1]).all():
        typer.echo(f"no pixel of {a} and {b} differs; see {target}")
        return
    box = found.box
    side = f"{box.right - box.left}×{box.bottom - box.top}"
    typer.echo(f"most different: {side} px at {box.left},{box.top}; see {target}")


def _parse_numbers(option: str, text: str, *, count: int | None = None) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or count not in (None, len(parts)):
        wanted = "whole numbers" if count is None else f"{count} whole numbers"
        raise UsageError(f"{option} must be {wanted} with commas between them, got {text!r}")
    return [int(part) for part in parts]


def _box_inside(corner: list[int], size: tuple[int, int]) -> Box:
    from tadsr.measure.regions import Box

    left, top, width, height = corner
    box = Box(left, top, left + width, top + height)
    if not (width and height) or box.right > size[1] or box.bottom > size[0]:
        raise UsageError(
            f"--crop must lie inside the result's {size[1]}×{size[0]} px and not be empty, got "
            f"{','.join(map(str, corner))}"
        )
    return box


def _short_names(paths: list[Path]) -> list[str]:
    """Name pictures by their files, and by their folders where the files' names are the same."""
    for names in ([path.name for path in paths], [str(path) for path in paths]):
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({number})" for number, path in enumerate(paths, 1)]
