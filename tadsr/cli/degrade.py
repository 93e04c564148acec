"""`tadsr degrade`: make low-quality partners of photographs, each with its recipe."""

from __future__ import annotations

import os
import traceback
from pathlib import Path
from typing import Literal

import typer
from tqdm import tqdm

from tadsr.cli import options
from tadsr.cli.console import ON_TERMINALS, end_run
from tadsr.cli.reporting import UsageError
from tadsr.cli.targets import check_place, plan_jobs


def degrade(
    source: str = options.argument("INPUT", "Photograph or folder."),
    output: str = options.argument("OUTPUT", "Folder to write to."),
    preset: Literal["realesrgan", "web", "mild", "bicubic"] = options.option(
        "realesrgan",
        "--preset",
        "web, realesrgan: as online; mild: a good camera's; bicubic: only shrunk.",
    ),
    scale: int = options.option(
        4,
        "--scale -s N",
        "Factor to shrink by.",
        callback=options.within(1, 64, "4 is what TADSR restores"),
    ),
    seed: int = options.option(
        0, "--seed N", "Another seed gives other results.", callback=options.SEED_RANGE
    ),
    replay: Path | None = options.option(
        None, "--replay FILE", "Repeat what a degradations.jsonl says, not preset, scale, seed."
    ),
    format: str = options.format_option(
        ["png", "webp", "jpg"], "png", "Format of the outputs; jpg and webp lose a little more."
    ),
    overwrite: bool = options.OVERWRITE,
    quiet: bool = options.QUIET,
    debug: bool = options.DEBUG,
) -> None:
    """Write low-quality copies of photographs.

    They are for training and for measuring.

    \b
    Examples:
      tadsr degrade photos/ lq/                   Real-ESRGAN's degradation at x4
      tadsr degrade photos/ lq/ --preset mild --seed 7
      tadsr degrade photos/ lq2/ --replay lq/degradations.jsonl

    OUTPUT/degradations.jsonl says for each image what was done to it. That depends on
    the seed and on the image's relative name alone, so a folder can grow later.
    """
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"OUTPUT must be a folder, but {output} is a file")
    jobs = plan_jobs([source], f"{output}{os.sep}", format=format, scale=scale)
    check_place(folder / jobs[0].target.name)

    from tadsr.degradation.partners import PartnerSettings, make_partners, read_records

    records = None if replay is None else dict(read_records(replay))
    settings = PartnerSettings(preset, scale, seed, records, overwrite)
    root = Path(source) if os.path.isdir(source) else Path(source).parent
    with tqdm(total=len(jobs), unit="image", disable=quiet or ON_TERMINALS) as bar:

        def count(_: Path, error: Exception | None) -> None:
            bar.update()
            if debug and error is not None:
                typer.echo("".join(traceback.format_exception(error)), err=True)

        made = make_partners(jobs, root, folder, settings, on_photo=count)
    failures = [f"{path}: {reason}" for path, reason in made.failures.items()]
    end_run(f"{made.num_written} written, {made.num_skipped} skipped", failures, quiet)
