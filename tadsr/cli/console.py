"""What a run over images says: progress, a line per image, and a summary at its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import typer
from tqdm import tqdm

from tadsr.progress import Progress

if TYPE_CHECKING:
    from tadsr.folders.outcome import Outcome
    from tadsr.folders.run import Pace

ON_TERMINALS = None
"""Of tqdm's `disable`: bars are shown on a terminal only."""


class ImageProgress:
    """A progress bar for the current image, shown only if it takes a while."""

    def __init__(self, quiet: bool = False) -> None:
        self._open = partial(tqdm, leave=False, disable=quiet or ON_TERMINALS)
        self._bar = tqdm(disable=True)

    def of(self, image: object) -> Progress:
        """Begin an image and return its progress callback."""
        self.close()
        form = "{l_bar}{bar}| {elapsed}<{remaining}"
        bar = self._bar = self._open(total=1.0, delay=2, bar_format=form)
        return lambda share: bar.update(share - bar.n)  # nothing once another image has begun

    def wait_for(self, what: str) -> None:
        """Show on a terminal what is being waited for, until the next image or `close`."""
        self.close()
        self._bar = self._open(desc=f"{what} …", bar_format="{desc}")

    def close(self) -> None:
        """Remove the bar or the waiting line."""
        self._bar.close()

    def __enter__(self) -> ImageProgress:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@dataclass
class Console:
    """Says what becomes of a run's images, and counts it."""

    num_images: int
    shown: Callable[[str], str] = str
    """What a line says of files that stand for standard streams."""
    quiet: bool = False
    debug: bool = False
    num_written: int = 0
    num_skipped: int = 0
    failures: list[str] = field(default_factory=list)
    pace: Pace | None = None
    megapixels: float = 0.0
    """Of the results that were written, all frames counted."""

    def __enter__(self) -> Console:
        hidden = True if self.quiet or self.num_images == 1 else ON_TERMINALS
        self._bar = tqdm(total=self.num_images, unit="image", disable=hidden)
        self.progress = ImageProgress(self.quiet)
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.close()
        self._bar.close()

    def say(self, message: str, *, err: bool = True) -> None:
        """Print a line beside the bars, unless the run is quiet."""
        self.progress.close()
        if message and not self.quiet:
            with self._bar.external_write_mode():
                typer.echo(self.shown(message), err=err)

    def add(self, outcome: Outcome) -> None:
        """Count an image, and say what became of it."""
        self.progress.close()
        job = outcome.job
        self._bar.update()
        self._bar.set_postfix_str(job.source.name)
        self.say(outcome.note)
        if outcome.status == "skipped":
            self.num_skipped += 1
            self.say(outcome.message)
        elif outcome.status == "failed":
            self.failures.append(self.shown(outcome.message))
            if self.debug:
                with self._bar.external_write_mode():
                    typer.echo(outcome.traceback, err=True)
        else:
            self.num_written += 1
            size = f"{outcome.size[0]}×{outcome.size[1]}"
            size += f", {outcome.num_frames} frames" if outcome.num_frames > 1 else ""
            megapixels = outcome.size[0] * outcome.size[1] * outcome.num_frames / 1e6
            self.megapixels += megapixels
            rate = f"{outcome.seconds:.1f} s, {_rate_text(outcome.seconds / megapixels)}"
            if self._bar.disable:
                self.say(f"{job.source} -> {job.target} ({size}, {rate})", err=False)

    def finish(self) -> None:
        """Print how many images were written, were skipped and failed, and exit with 1 if any."""
        if self.num_images == 1:
            end_run("", self.failures, quiet=True)
            return
        if self.failures:
            failed = f"Error: {len(self.failures)} of {self.num_images} images failed:"
            typer.echo("\n  ".join([failed, *self.failures]), err=True)
        if not self.quiet:
            counts = f"{self.num_written} written, {self.num_skipped} skipped"
            typer.echo(f"{counts}, {len(self.failures)} failed")
            if self.pace is not None and self.num_written > 1:
                rate = _rate_text(self.pace.seconds / self.megapixels)
                typer.echo(f"{self.megapixels:.3g} megapixels, {rate}; {self.pace.described()}")
        if self.failures:
            raise typer.Exit(1)


def end_run(counts: str, failures: Sequence[str], quiet: bool) -> None:
    """Print each failure and the counts of a run, and exit with 1 if there are failures."""
    for failure in failures:
        typer.echo(f"Error: {failure}", err=True)
    if not quiet:
        typer.echo(f"{counts}, {len(failures)} failed")
    if failures:
        raise typer.Exit(1)


def _rate_text(seconds: float) -> str:
    """Write seconds per megapixel with two digits that count, and without an exponent."""
    return f"{float(f'{seconds:.2g}'):g} s per megapixel"
