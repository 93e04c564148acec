"""The command line: restore, measure, train and inspect, a file per command or pair of them.

Nothing here imports torch until a command runs, so that help and version answer at once.
"""

from __future__ import annotations

import atexit
import gc
import io
import os
import sys

import typer

from tadsr.cli.checkpoints import convert, export, info
from tadsr.cli.degrade import degrade
from tadsr.cli.doctor import doctor
from tadsr.cli.evaluate import evaluate
from tadsr.cli.hosting import demo, serve
from tadsr.cli.options import option
from tadsr.cli.reporting import Command, Group
from tadsr.cli.sheets import compare, sweep
from tadsr.cli.tagger import convert_tagger, tag
from tadsr.cli.train import train
from tadsr.cli.upscale import upscale
from tadsr.version import __version__

__all__ = ["app", "main"]

SPINS = "1000"
"""How often a thread of torch looks for work before it sleeps; the default is 300,000."""

_HELP = """Enlarge photographs in one diffusion step (TADSR).

\b
Examples:
  tadsr upscale photo.jpg                  writes photo_x4.png
  tadsr upscale photos/ sharp/             a folder and its sub-folders
  tadsr info tadsr-tiny                    what a model is made of
  tadsr sweep photo.jpg                    one sheet of several timesteps
  tadsr compare a.png b.png                where and how far two pictures differ
  tadsr evaluate results/ --hq originals/  figures and a plot
  tadsr train --config recipe.yaml         a model of your own
  tadsr tag photos/ --tagger FOLDER        what a tagger sees in pictures
  tadsr doctor                             what runs on this machine, and why not
  tadsr demo                               a page in the browser
  tadsr serve                              an HTTP service
  tadsr COMMAND --help                     all options of a command
"""

# Plain text: rich's boxes break paths and messages that people copy, and its tracebacks are long.
app = typer.Typer(
    cls=Group,
    help=_HELP,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    *(upscale, info, convert, tag, convert_tagger, evaluate, sweep, compare, degrade, train),
    *(doctor, demo, serve),
):
    has_defaults = command in (info, convert, convert_tagger, doctor, demo, serve)
    app.command(cls=Command, no_args_is_help=not has_defaults)(command)
app.add_typer(export, name="export")


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"tadsr {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = option(
        False,
        "--version -V",
        "Show the version and exit.",
        callback=_show_version,
        is_eager=True,
    ),
) -> None:
    for stream in (sys.stdout, sys.stderr):
        # A name of a file may hold what the terminal's encoding does not, or be no text at all.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def main() -> None:
    """Run the command line on `sys.argv` and exit: 0 done, 1 failed, 2 misused, 130 Ctrl-C.

    `tadsr upscale` exits with 143 after SIGTERM.
    """
    atexit.register(_keep_garbage)
    # Read by torch once: large tensors in pages of 2 MB, which take fewer faults and look-ups.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if "OMP_WAIT_POLICY" not in os.environ:
        # Read by torch's threads once: beside other work they must sleep rather than wait awake.
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    app(prog_name="tadsr")


def _keep_garbage() -> None:
    """Leave objects to the end of the process: to look through torch's takes most of a second."""
    if "triton" not in sys.modules:  # whose binding prints what it takes for leaks
        gc.freeze()
