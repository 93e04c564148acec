"""`-` for standard input and output: kept in files of a temporary folder meanwhile."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from tadsr.cli.reporting import UsageError

STREAM = "-"


@contextmanager
def standard_streams(
    paths: Sequence[str], output: str | None, suffix: str
) -> Iterator[tuple[list[str], str | None, Callable[[str], str]]]:
    """Replace `-` by temporary files.

    Args:
        output: What `--output` said, or None; `-` is standard output.

    Yields:
        The paths, the output, and what replaces the files' names in messages.
    """
    paths = list(paths)
    if output is None and len(paths) > 1 and paths[-1] == STREAM:
        output = paths.pop()
    if STREAM not in paths and output != STREAM:
        yield paths, output, str
        return
    if STREAM in paths and output is None:
        output = paths.pop() if len(paths) == 2 and paths[0] == STREAM else STREAM
    if len(paths) != 1:
        raise UsageError(f"{STREAM} stands for one image, got {len(paths)} inputs")
    with TemporaryDirectory(prefix="tadsr-") as folder:
        if paths == [STREAM]:
            paths = [str(Path(folder, "stdin"))]
            with open(paths[0], "wb") as file:
                shutil.copyfileobj(click.get_binary_stream("stdin"), file)

        def shown(text: str) -> str:
            text = text.replace(str(Path(folder, "stdin")), "standard input")
            return text.replace(str(Path(folder, f"stdout{suffix}")), "standard output")

        if output != STREAM:
            yield paths, output, shown
            return
        result = Path(folder, f"stdout{suffix}")
        yield paths, str(result), shown
        if result.exists():
            with open(result, "rb") as file:
                stdout = click.get_binary_stream("stdout")
                shutil.copyfileobj(file, stdout)
                stdout.flush()
