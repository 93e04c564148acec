"""`tadsr compare`: two pictures side by side, their difference, and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tadsr.cli import options
from tadsr.cli.reporting import (
    as_usage_errors,
    check_range,
    readable_errors,
    silence_libraries,
)
from tadsr.cli.targets import check_place

COMPARE_HELP = """Compare two pictures, and both with an original.

\b
Prints PSNR and SSIM, and writes a sheet: the pictures side by side, their
absolute differences (amplified by the factor that the label states), and below
each the part where A and B differ most. The framed part is shown enlarged.

\b
Examples:
  tadsr compare a.png b.png                writes a_vs_b.png
  tadsr compare a.png b.png hq.png         both against the original as well
  tadsr compare a.png b.png -o sheet.jpg --width 600

The pictures must have one size. They are compared as they are seen: turned into sRGB of 8 bit by
their ICC profiles, over white.
"""


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="A picture.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another of the same size.")],
    hq: Annotated[Path | None, typer.Argument(metavar="HQ", help="The original of both.")] = None,
    output: options.SheetOption = None,
    border: options.BorderOption = 4,
    width: options.PanelWidthOption = 320,
    overwrite: options.OverwriteOption = False,
    debug: options.DebugOption = False,
) -> None:
    """Run `tadsr compare`."""
    check_range("--border", border, 0, 10_000, "papers leave out as many px as the scale")
    check_range("--width", width, 32, 8192, "large sheets show more")
    target = output or a.with_name(f"{a.stem}_vs_{b.stem}.png")
    with readable_errors(debug):
        check_place(target)
        from tadsr.images import check_writable, write_image
        from tadsr.measure.compare import compare_images, draw_comparison
        from tadsr.measure.pictures import read_rgb8

        silence_libraries(debug)
        if target.parent.is_dir():
            check_writable(target, overwrite=overwrite)
        paths = [path for path in (a, b, hq) if path is not None]
        images = [read_rgb8(path) for path in paths]
        names = _short_names(paths)
        with as_usage_errors():
            found = compare_images(*images, names=names, border_px=border)
        sheet = draw_comparison(found, *images, panel_px=width)
        typer.echo(_format_figures(found.figures))
        target.parent.mkdir(parents=True, exist_ok=True)
        write_image(sheet, target, overwrite=overwrite)
        if (images[0] == images[1]).all():
            typer.echo(f"no pixel of {a} and {b} differs; see {target}")
            return
        box = found.box
        side = f"{box.right - box.left}×{box.bottom - box.top}"
        typer.echo(f"most different: {side} px at {box.left},{box.top}; see {target}")


def _short_names(paths: list[Path]) -> list[str]:
    """Name pictures by their files, and by their folders where the files' names are the same."""
    for names in ([path.name for path in paths], [str(path) for path in paths]):
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({number})" for number, path in enumerate(paths, 1)]


def _format_figures(figures: dict[tuple[str, str], dict[str, float]]) -> str:
    columns = list(next(iter(figures.values())))
    lines = [["", *(f"{name} ↑" for name in columns)]]
    for (first, second), values in figures.items():
        lines.append([f"{first} – {second}", *(f"{values[name]:.4f}" for name in columns)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
