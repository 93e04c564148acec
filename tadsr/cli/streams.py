"""`-` for standard input and output: kept in files of a temporary folder meanwhile."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from tadsr.cli.reporting import UsageError

STREAM = "-"


@contextmanager
def standard_streams(
    paths: Sequence[str], output: str | None, suffix: str
) -> Iterator[tuple[list[str], str | None]]:
    """Replace `-` by temporary files.

    Args:
        output: What `--output` said, or None; `-` is standard output.
    """
    paths = list(paths)
    if output is None and len(paths) > 1 and paths[-1] == STREAM:
        output = paths.pop()
    if STREAM not in paths and output != STREAM:
        yield paths, output
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
        if output != STREAM:
            yield paths, output
            return
        result = Path(folder, f"stdout{suffix}")
        yield paths, str(result)
        if result.exists():
            with open(result, "rb") as file:
                stdout = click.get_binary_stream("stdout")
                shutil.copyfileobj(file, stdout)
                stdout.flush()
