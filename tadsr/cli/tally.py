"""What became of the images of a run, and what is said of them at its end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from tadsr.folders.run import Pace


@dataclass
class Tally:
    """What became of the images."""

    num_written: int = 0
    num_skipped: int = 0
    failures: list[str] = field(default_factory=list)
    pace: Pace | None = None
    megapixels: float = 0.0
    """Of the results that were written, all frames counted."""


def rate_text(seconds: float) -> str:
    """Write seconds per megapixel with two digits that count, and without an exponent."""
    return f"{float(f'{seconds:.2g}'):g} s per megapixel"


def print_tally(tally: Tally, num_jobs: int, quiet: bool) -> None:
    """Print how many of a run's images were written, were skipped and failed."""
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
            rate = tally.pace.seconds / tally.megapixels
            typer.echo(
                f"{tally.megapixels:.3g} megapixels, {rate_text(rate)}; {tally.pace.described()}"
            )
