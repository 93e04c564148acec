"""How commands talk: errors and suggestions, quiet libraries, sizes and tables for people."""

from __future__ import annotations

import errno
import math
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from tadsr.errors import TADSRError, TADSRWarning, Terminated, reason_of

READABLE_ERRORS = (TADSRError, ValueError, TypeError, OSError)
"""What goes wrong in use; anything else is a bug of ours and keeps its traceback."""

_ECHO_SECONDS = 1
"""A supervisor and its group may send one SIGTERM each, of which the second must not end what the
first has begun to tidy up."""


_KINDS = {"int_parsing": "a whole number", "float_parsing": "a number"}
"""What pydantic calls a wrong value, and people."""
_OPTIONS_INSTEAD = {
    "-i --input": "inputs need no option: tadsr upscale photo.jpg",
    "-n --model-name --model_name": "-m names the model",
    "--outscale -z --upscale --factor": "-s is the output's size over the input's",
    "--ext": "-f is the format",
    "--half --fp16": "--dtype fp16 is for GPUs",
    "--fp32 --no-half --precision": "--dtype sets it, such as fp32",
    "-g --gpu --gpu-id --gpu-ids --cpu": "--device takes cpu, cuda or cuda:N",
    "--tile-size --tile_size --tile_pad --tile_overlap": "--tile and --max-memory set it",
    "--face_enhance": "--timestep-map keeps faces faithful",
    "--denoise_strength --strength --fidelity --steps": (
        "-t moves from faithful to vivid, in one step"
    ),
    "-y --force": "--overwrite replaces results",
    "-r --recursive": "sub-folders are read anyway",
    "-j --jobs --workers --num-workers --batch-size": (
        "there is nothing to set: one process keeps the device busy"
    ),
    "--share --listen --server-name": "--host 0.0.0.0 lets others in",
    "-p --server-port": "--port sets it",
    "--lowvram --medvram": "--max-memory bounds it",
    "--resume --skip-existing": "results that exist are skipped anyway",
    "-w --resolution": "--width and --height set it",
    "--auto-launch --inbrowser": "--open opens the page",
    "--alpha_upsampler": "alpha is carried anyway",
    "--tta": "there is none; leave it out",
    "-c": "--quality sets it",
}
"""What users of other upscalers type, and what does it here."""
_COMMANDS_INSTEAD = {
    "i p run enhance restore": "tadsr upscale",
    "s": "tadsr serve",
    "ui gui webui": "tadsr demo",
    "d download": "tadsr upscale -m owner/name, which downloads",
    "finetune fine-tune": "tadsr train",
    "list models": "tadsr info",
    "onnx openvino": "tadsr export onnx",
    "help": "tadsr --help",
    "version": "tadsr --version",
}


class UsageError(typer.BadParameter):
    """The command line is wrong; exits with 2."""

    def format_message(self) -> str:
        """Return the message alone, without "Invalid value"."""
        return self.message


@contextmanager
def readable_errors(debug: bool) -> Iterator[None]:
    """Turn expected errors into one message on stderr and exit code 1.

    Raises:
        typer.Exit: An expected error came and `debug` is False.
    """
    try:
        yield
    except Terminated as error:
        typer.echo(str(error) or "Terminated; what is written is whole and stays.", err=True)
        raise typer.Exit(128 + signal.SIGTERM) from error
    except KeyboardInterrupt as error:
        typer.echo(str(error) or "Interrupted; what is written is whole and stays.", err=True)
        raise  # typer exits with 130
    except READABLE_ERRORS as error:
        # A closed pipe, as in `tadsr info x | head -1`, is ended silently by typer.
        if debug or getattr(error, "errno", None) == errno.EPIPE:
            raise
        file = getattr(error, "filename", None)
        typer.echo(f"Error: {error if file is None else f'{file}: {reason_of(error)}'}", err=True)
        raise typer.Exit(1) from error


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Raise Terminated on SIGTERM, as Ctrl-C raises KeyboardInterrupt."""
    last = -math.inf

    def interrupt(*_: object) -> None:
        nonlocal last
        is_echo, last = time.monotonic() - last < _ECHO_SECONDS, time.monotonic()
        if not is_echo:
            raise Terminated

    # Other threads take no signals, and who ignores or handles them shall go on to.
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def as_usage_errors(where: str = "") -> Iterator[None]:
    """Report wrong values as misuse of the command line; `where` begins the message."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UsageError(f"{where}{error}") from error


def check_range(option: str, value: int | None, low: int, high: int, hint: str) -> None:
    """Check a whole number given to an option."""
    if value is not None and not low <= value <= high:
        raise UsageError(f"{option} must be in {low}..{high}, got {value}; {hint}")


def silence_libraries(debug: bool, quiet: bool = False) -> None:
    """Silence diffusers, transformers and torch, and print our own warnings as plain lines."""
    if debug:
        return
    warnings.simplefilter("ignore")
    if not quiet:
        warnings.simplefilter("always", TADSRWarning)
    warnings.showwarning = _say_once()
    # Not their bars: transformers' switch is huggingface-hub's, whose downloads shall be seen.
    for library in ("diffusers", "transformers"):
        # Read when it is imported, which only a command that gets so far does.
        os.environ[f"{library.upper()}_VERBOSITY"] = "error"
        if f"{library}.utils.logging" in sys.modules:
            sys.modules[f"{library}.utils.logging"].set_verbosity_error()
    if quiet:
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()


def _say_once() -> Callable[..., None]:
    """Return a `warnings.showwarning` that prints each message once, as a line."""
    said: set[str] = set()

    def show(message: Warning | str, *about: object) -> None:
        text = str(message)
        if text in said:
            return
        said.add(text)
        from tqdm import tqdm

        with tqdm.external_write_mode():
            typer.echo(f"Warning: {text}", err=True)

    return show


class Command(TyperCommand):
    """A command with --debug, which suggests the option that was meant."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse arguments, with a suggestion in the error for an unknown option."""
        with _suggesting_options():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command: expected errors become one line unless --debug is given."""
        debug = ctx.params["debug"]
        with readable_errors(debug):
            silence_libraries(debug, ctx.params.get("quiet", False))
            return super().invoke(ctx)


class Group(TyperGroup):
    """A group that suggests options too, and `upscale` where a file came instead of a command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse arguments, with a suggestion in the error for an unknown option."""
        try:
            with _suggesting_options():
                return super().parse_args(ctx, args)
        except Exception as error:
            name = getattr(error, "option_name", None)
            commands = [
                n for n, c in self.commands.items() if any(name in p.opts for p in c.params)
            ]
            if name and commands:
                error.message = f"{name} comes after the command, as in tadsr {commands[0]} {name}"
            raise

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        """Find the command, with a suggestion in the error for an unknown one."""
        name = args[0]
        if self.get_command(ctx, name) is None:
            is_path = os.path.exists(name) or os.path.splitext(name)[1] != ""
            meant = _instead(_COMMANDS_INSTEAD, name)
            if is_path and not name.startswith("-"):
                meant = f"tadsr upscale {name}"
            if meant:
                ctx.fail(f"No such command {name!r}. Did you mean '{meant}'?")
        return super().resolve_command(ctx, args)


def _instead(table: dict[str, str], name: str) -> str | None:
    return next((meant for names, meant in table.items() if name in names.split()), None)


@contextmanager
def _suggesting_options() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # Told by its attributes: the class lives in click or in typer, by typer's version.
        name, possibilities = (getattr(error, a, None) for a in ("option_name", "possibilities"))
        if instead := _instead(_OPTIONS_INSTEAD, name or ""):
            error.message = f"{error.message}: {instead}"
            error.possibilities = None
        elif possibilities:
            begun = [option for option in possibilities if option.startswith(name or "-")]
            close = " or ".join(sorted(begun or possibilities))
            error.message = f"{error.message}. Did you mean {close}?"
            error.possibilities = None
        if type(error.__cause__).__name__ == "ValidationError":  # of pydantic, by typer's version
            found = error.__cause__.errors()[0]
            kind = _KINDS.get(found["type"])
            error.message = (
                f"{found['input']!r} is not {kind}"
                if kind
                else error.message.removeprefix("Value error, ")
            )
        raise


def parse_bytes(text: str) -> int:
    """Turn a size as people write it, such as "6GB", "500 MB" or "2GiB", into bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if found is None or not float(found[1]):
        raise UsageError(f"a size must be like 6GB, 500MB or 2GiB, got {text!r}")
    power = " KMGT".index(found[2].upper() or " ")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def format_bytes(count: float) -> str:
    """Return a size in bytes as people read it, such as "5.2 MB"."""
    return _format_unit(count, ("B", "kB", "MB", "GB"))


def format_count(count: float) -> str:
    """Return a large number as people read it, such as "2.6 M"."""
    return _format_unit(count, ("", "k", "M", "G")).strip()


def _format_unit(value: float, units: tuple[str, ...]) -> str:
    power = 0
    while value >= 1000 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {units[power]}"


def align(rows: Iterable[Sequence[str]]) -> str:
    """Return rows of cells as lines, with each column as wide as its widest cell."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
