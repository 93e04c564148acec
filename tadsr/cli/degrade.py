"""`tadsr degrade`: make low-quality partners of photographs, each with its recipe."""

from __future__ import annotations

import os
import traceback
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from tadsr.cli import options
from tadsr.cli.reporting import (
    UsageError,
    check_range,
    readable_errors,
    silence_libraries,
)
from tadsr.cli.targets import check_place, parse_format, plan_jobs

FORMATS = ["png", "webp", "jpg"]

DEGRADE_HELP = """Write low-quality copies of photographs.

They are for training and for measuring.

\b
Examples:
  tadsr degrade photos/ lq/                   Real-ESRGAN's degradation at x4
  tadsr degrade photos/ lq/ --preset mild --seed 7
  tadsr degrade photos/ lq2/ --replay lq/degradations.jsonl

OUTPUT/degradations.jsonl says for each image what was done to it. That depends on
the seed and on the image's relative name alone, so a folder can grow later.
"""


def degrade(
    source: Annotated[str, typer.Argument(metavar="INPUT", help="Photograph or folder.")],
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder to write to.")],
    preset: Annotated[
        Literal["realesrgan", "web", "mild", "bicubic"],
        typer.Option(
            "--preset",
            help="web, realesrgan: as online; mild: a good camera's; bicubic: only shrunk.",
        ),
    ] = "realesrgan",
    scale: Annotated[
        int, typer.Option("--scale", "-s", metavar="N", help="Factor to shrink by.")
    ] = 4,
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", help="Another seed gives other results.")
    ] = 0,
    replay: Annotated[
        str | None,
        typer.Option(
            "--replay",
            metavar="FILE",
            help="Repeat what a degradations.jsonl says, not preset, scale, seed.",
        ),
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            "--format",
            "-f",
            parser=partial(parse_format, formats=FORMATS),
            autocompletion=lambda: FORMATS,
            metavar="|".join(FORMATS),
            help="Format of the outputs; jpg and webp lose a little more.",
        ),
    ] = "png",
    overwrite: options.OverwriteOption = False,
    quiet: options.QuietOption = False,
    debug: options.DebugOption = False,
) -> None:
    """Run `tadsr degrade`."""
    check_range("--scale", scale, 1, 64, "4 is what TADSR restores")
    check_range("--seed", seed, 0, 2**63 - 1, "any number will do")
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"OUTPUT must be a folder, but {output} is a file")
    with readable_errors(debug):
        jobs = plan_jobs([source], f"{output}{os.sep}", format=format, scale=scale)
        check_place(folder / jobs[0].target.name)
        silence_libraries(debug, quiet)
        from tqdm import tqdm

        from tadsr.degradation.partners import PartnerSettings, make_partners, read_records

        records = None if replay is None else dict(read_records(Path(replay)))
        settings = PartnerSettings(preset, scale, seed, records, overwrite)
        root = Path(source) if os.path.isdir(source) else Path(source).parent
        hidden = True if quiet else None  # None: a bar on a terminal only
        with tqdm(total=len(jobs), unit="image", disable=hidden) as bar:

            def count(_: Path, error: Exception | None) -> None:
                bar.update()
                if debug and error is not None:
                    typer.echo("".join(traceback.format_exception(error)), err=True)

            made = make_partners(jobs, root, folder, settings, on_photo=count)
    if not quiet:
        counts = f"{made.num_written} written, {made.num_skipped} skipped"
        typer.echo(f"{counts}, {len(made.failures)} failed")
    for path, reason in made.failures.items():
        typer.echo(f"Error: {path}: {reason}", err=True)
    if made.failures:
        raise typer.Exit(1)
