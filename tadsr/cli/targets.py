"""Decide which file goes where before anything is read, and say so: no pixels.

`-` for standard input and output is kept in files of a temporary folder meanwhile.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from functools import cache
from glob import glob, has_magic
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import typer

from tadsr.cli.reporting import UsageError, as_usage_errors
from tadsr.errors import ImageWriteError, TADSRError
from tadsr.folders.jobs import (
    Draft,
    Job,
    check_targets,
    draft_folder,
    is_result_of,
    leave_out_results,
    name_targets,
    untagged,
)
from tadsr.image_files import INPUT_SUFFIXES
from tadsr.whole_file import why_unwritable

if TYPE_CHECKING:
    from tadsr.folders.restoring import FileRequest

FORMAT_SUFFIXES = {
    "png": (".png", ".apng"),
    "jpg": (".jpg", ".jpeg"),
    "webp": (".webp",),
    "tiff": (".tiff", ".tif"),
    "avif": (".avif",),
    "bmp": (".bmp",),
    "gif": (".gif",),
    "jxl": (".jxl",),
}
"""Suffixes that an output file may have, by format; the first where we name it."""
_OUTPUT_SUFFIXES = tuple(suffix for group in FORMAT_SUFFIXES.values() for suffix in group)
_STREAM = "-"


def parse_format(text: str, formats: Sequence[str]) -> str:
    """Return the format that is called so, or by one of its suffixes."""
    name = text.lower().removeprefix(".")
    for format in formats:
        if name == format or f".{name}" in FORMAT_SUFFIXES.get(format, ()):
            return format
    raise typer.BadParameter(f"must be one of {', '.join(formats)}, got {text!r}")


def plan_jobs(
    paths: Sequence[str],
    output: str | None,
    *,
    format: str | None,
    scale: float,
    own_tag: str | None = None,
    tag: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Job]:
    """Decide which images are read and where each result goes.

    Args:
        format: A key of FORMAT_SUFFIXES, or "same" for the input's where it can be written; None
            takes an output file's suffix, else PNG.
        tag: What follows the stem of every name; None for that, and only there.
    """
    if "" in (*paths, output):
        raise UsageError("a path must not be empty; is a variable of the shell not set?")
    paths = _expand(paths, output)
    inputs, output = split_output(paths, output, scale)
    if output is None and len(paths) == 2 and not os.path.isdir(paths[1]):
        _check_second(*paths, say)
    for path in inputs:
        if not os.path.exists(path):
            raise UsageError(f"{path} must be an image file or a folder, {_missing_hint(path)}")
    suffix = FORMAT_SUFFIXES["png" if format in (None, "same") else format][0]
    # A pipe is no folder either.
    is_one_file = len(inputs) == 1 and not os.path.isdir(inputs[0])
    if output is not None and not _is_folder_name(output, is_one_file):
        _check_output_file(output, format, is_one_file)
        jobs = [Job(Path(inputs[0]), Path(output))]
    else:
        with as_usage_errors():
            beside = tag if tag is not None else own_tag or f"_x{scale:g}"
            drafts = _draft(inputs, output, beside, tag, say)
            if format == "same":
                suffixes = ((draft, draft.source.suffix.lower()) for draft in drafts)
                drafts = [
                    replace(d, suffix=s if s in _OUTPUT_SUFFIXES else "") for d, s in suffixes
                ]
            jobs = name_targets(leave_out_results(drafts, scale, suffix, say), suffix)
    with as_usage_errors():
        check_targets(jobs)
    return jobs


def split_output(
    paths: Sequence[str], output: str | None, scale: float
) -> tuple[list[str], str | None]:
    """Tell inputs and output apart, as `cp` does, but never take a photo to be replaced.

    With `--output` every path is an input. Without it, the last of several paths is the output if
    it is a folder, ends with a separator, does not exist yet, or is what an earlier run made of
    the only other one.

    Returns:
        The inputs, and the output or None.
    """
    *rest, last = paths
    if output is not None or not rest:
        return list(paths), output
    if _is_folder(last) or not os.path.exists(last):
        return rest, last
    first, second = Path(rest[0]), Path(last)
    is_pair = len(rest) == 1 and first.is_file() and second.is_file()
    # A name of our own is what a pattern found, of whatever scale.
    is_named = untagged(second) != first.with_suffix("")
    if is_pair and is_named and is_result_of(second, first, scale):
        return rest, last
    return list(paths), None


def _check_second(first: str, second: str, say: Callable[[str], None]) -> None:
    """Check a file that exists and may have been meant as the output."""
    suffix = os.path.splitext(second)[1].lower()
    if not os.path.isfile(second) or (suffix and suffix not in INPUT_SUFFIXES):
        raise UsageError(
            f"the second of two paths must be an image, a folder or new, got {second}; if it is "
            f"the output, write -o {second}"
        )
    if os.path.isdir(first):
        say(f"{second}: exists, so it is read as one more image; -o names the output")


def _expand(paths: Sequence[str], output: str | None) -> list[str]:
    """Expand patterns such as "photos/*.png" that the shell left as they are."""
    expanded: list[str] = []
    for number, path in enumerate(paths):
        is_output = output is None and 0 < number == len(paths) - 1
        found = [] if os.path.exists(path) or is_output else sorted(glob(path, recursive=True))
        expanded += found or [path]
    return expanded


def check_places(jobs: Sequence[Job]) -> list[Job]:
    """Check that results can be written where they are planned."""
    checked = []
    why = cache(why_unwritable)
    for job in jobs:
        check_place(job.target if job.folder is None else job.folder / job.target.name, why)
        try:
            check_place(job.target, why)
        except ImageWriteError as error:
            is_done = os.path.lexists(job.target)
            job = job if is_done else replace(job, error=job.error or str(error))
        checked.append(job)
    return checked


def check_place(target: Path, why: Callable[[Path], str | None] = why_unwritable) -> None:
    """Check that a file can be written; its folder need not exist yet."""
    if reason := why(target.parent):
        raise ImageWriteError(f"{target}: cannot be written, for {reason}; choose another folder")


def _is_folder(path: str) -> bool:
    separators = tuple(filter(None, (os.sep, os.altsep)))
    return os.path.isdir(path) or path.endswith(separators)


def _is_folder_name(output: str, is_one_file: bool) -> bool:
    if _is_folder(output) or os.path.exists(output):
        return _is_folder(output)
    # What does not exist yet is a folder where only a folder makes sense.
    known = INPUT_SUFFIXES.union(_OUTPUT_SUFFIXES)
    return not is_one_file and Path(output).suffix.lower() not in known


def _check_output_file(output: str, format: str | None, is_one_file: bool) -> None:
    if not is_one_file:
        raise UsageError(
            f"the output of several images must be a folder, got the file {output}; "
            f"did you mean the folder {os.path.splitext(output)[0]}{os.sep} ?"
        )
    suffix = Path(output).suffix.lower()
    if suffix not in _OUTPUT_SUFFIXES:
        raise UsageError(
            f"an output file must end in one of {' '.join(_OUTPUT_SUFFIXES)}, got {output}; "
            f"for a folder write {output}{os.sep}"
        )
    if format is not None and suffix not in FORMAT_SUFFIXES[format]:
        raise UsageError(
            f"--format {format} does not fit the output {output}; leave one of the two out"
        )


def _missing_hint(path: str) -> str:
    folder, name = os.path.split(path)
    if "://" in path:
        return "but addresses are not read; download it first"
    if has_magic(path):
        return "but no file has a name of that kind; check the path"
    try:
        close = get_close_matches(name, os.listdir(folder or "."), n=1)
    except OSError:
        close = []
    hint = f"did you mean {os.path.join(folder, close[0])}?" if close else "check the path"
    return f"but does not exist; {hint}"


def _draft(
    inputs: Sequence[str],
    output: str | None,
    tag: str,
    file_tag: str | None,
    say: Callable[[str], None],
) -> list[Draft]:
    """Return a draft per image; `tag` is for names beside their input, `file_tag` for all."""
    # The folder that several results go to holds the run's manifest.
    shared = Path(output) if output is not None and len(inputs) > 1 else None
    drafts: dict[Path, Draft] = {}  # a file that is named twice is read once
    for path in map(Path, inputs):
        if not path.is_dir():
            folder = path.parent if output is None else Path(output)
            beside = tag if output is None else file_tag or ""
            found = [Draft(path, folder, beside, root=shared)]
        else:
            named = path if path.name not in ("", "..") else path.resolve()  # "." has no name
            if output is None:
                root = named.with_name(f"{named.name}{tag}")
            else:
                # As with `cp -r`: of several folders each keeps its name.
                root = Path(output) if len(inputs) == 1 else Path(output) / named.name
            found = [
                replace(draft, root=shared or draft.root, tag=file_tag or "")
                for draft in draft_folder(path, root, Path(output) if output else root, say)
            ]
        for draft in found:
            drafts.setdefault(draft.source.absolute(), draft)
    return list(drafts.values())


def check_lossless(jobs: Sequence[Job], is_lossless: bool) -> None:
    """Raise UsageError if results are wanted lossless in a format that loses."""
    for job in jobs:
        if is_lossless and job.target.suffix.lower() in (".jpg", ".jpeg", ".avif", ".gif"):
            raise UsageError(f"--lossless must be for PNG, WebP, TIFF or BMP, got {job.target}")


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
    if output is None and len(paths) > 1 and paths[-1] == _STREAM:
        output = paths.pop()
    if _STREAM not in paths and output != _STREAM:
        yield paths, output, str
        return
    if _STREAM in paths and output is None:
        output = paths.pop() if len(paths) == 2 and paths[0] == _STREAM else _STREAM
    if len(paths) != 1:
        raise UsageError(f"{_STREAM} stands for one image, got {len(paths)} inputs")
    with TemporaryDirectory(prefix="tadsr-") as folder:
        read, result = Path(folder, "stdin"), Path(folder, f"stdout{suffix}")

        def shown(text: str) -> str:
            text = text.replace(str(read), "standard input")
            return text.replace(str(result), "standard output")

        if paths == [_STREAM]:
            paths = [str(read)]
            with read.open("wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file)
        yield paths, str(result) if output == _STREAM else output, shown
        if result.exists():
            with result.open("rb") as file:
                shutil.copyfileobj(file, sys.stdout.buffer)
            sys.stdout.flush()


def say_plan(jobs: Sequence[Job], request: FileRequest, say: Callable[[str], None]) -> None:
    """Say what a run would make, without its model."""
    from tadsr.folders.restoring import choose_target
    from tadsr.images import read_facts

    for job in jobs:
        try:
            if job.error:
                raise TADSRError(job.error)
            facts = read_facts(job.source, max_pixels=request.max_pixels)
            job = choose_target(job, request)
        except TADSRError as error:
            say(f"would fail: {error}")
            continue
        width, height = request.output_size_of(facts.size)
        is_there = os.path.lexists(job.target) and not request.overwrite
        reason = "exists, would be skipped" if is_there else f"{width}×{height}"
        say(f"{job.source} -> {job.target} ({reason})")
