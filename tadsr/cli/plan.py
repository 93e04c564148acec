"""Decide which file goes where before anything is read: paths only, no pixels."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from tadsr.cli.reporting import UsageError
from tadsr.errors import ImageWriteError

INPUT_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jfif", ".jp2", ".webp", ".avif", ".tif", ".tiff", ".bmp"}
    | {".gif", ".apng", ".heic", ".heif", ".hif", ".ppm", ".pgm", ".pbm", ".pnm"}
)
"""What a folder is searched for; a file that is named itself may have any suffix."""

FORMAT_SUFFIXES = {
    "png": (".png", ".apng"),
    "jpg": (".jpg", ".jpeg"),
    "webp": (".webp",),
    "tiff": (".tiff", ".tif"),
    "avif": (".avif",),
    "bmp": (".bmp",),
    "gif": (".gif",),
}
"""Suffixes that an output file may have, by format; the first where we name it."""

_OUTPUT_SUFFIXES = tuple(suffix for group in FORMAT_SUFFIXES.values() for suffix in group)


@dataclass(frozen=True)
class Job:
    """One image to upscale.

    Args:
        source: The file to read.
        target: The file to write.
    """

    source: Path
    target: Path


@dataclass(frozen=True)
class _Draft:
    """A source whose target is known but for its name."""

    source: Path
    folder: Path
    tag: str = ""

    def target(self, suffix: str, *, is_distinct: bool = False) -> Path:
        base = self.source.name if is_distinct else self.source.stem
        return self.folder / f"{base}{self.tag}{suffix}"


def plan_jobs(
    paths: Sequence[str], output: str | None, *, format: str | None, scale: float
) -> list[Job]:
    """Decide which images are read and where each result goes.

    Args:
        paths: Files and folders as typed; the last may be the output, see `split_output`.
        output: What `--output` said, or None.
        format: A key of FORMAT_SUFFIXES; None takes an output file's suffix, else PNG.
        scale: Named in outputs that lie beside their input.

    Returns:
        The jobs, one per image; their targets differ from each other and from every source.

    Raises:
        UsageError: A path does not exist, holds no image, or the output does not fit.
    """
    inputs, output = split_output(paths, output)
    for path in inputs:
        if not os.path.exists(path):
            raise UsageError(f"{path} must be an image file or a folder, {_missing_hint(path)}")
    suffix = FORMAT_SUFFIXES[format or "png"][0]
    is_one_file = len(inputs) == 1 and os.path.isfile(inputs[0])
    if output is not None and not _is_folder_name(output, is_one_file):
        _check_output_file(output, format, is_one_file)
        jobs = [Job(Path(inputs[0]), Path(output))]
    else:
        jobs = _name_targets(_draft(inputs, output, scale), suffix)
    _check_targets(jobs)
    return jobs


def split_output(paths: Sequence[str], output: str | None) -> tuple[list[str], str | None]:
    """Tell inputs and output apart, as `cp` does, but never take a file to be replaced.

    With `--output` every path is an input. Without it, the last of several paths is the output if
    it is a folder, ends with a separator, or does not exist yet.

    Args:
        paths: Files and folders as typed.
        output: What `--output` said, or None.

    Returns:
        The inputs, and the output or None.

    Raises:
        UsageError: Two files exist, and the second could be meant as input or as output.
    """
    *rest, last = paths
    if output is not None or not rest:
        return list(paths), output
    if _is_folder(last) or not os.path.exists(last):
        return rest, last
    if len(paths) == 2:
        raise UsageError(
            f"{last} exists already, so it could be a second input or the output; to replace it "
            f"use -o {last} --overwrite, to upscale both name a folder with -o"
        )
    return list(paths), None


def check_place(target: Path) -> None:
    """Check that a file can come to lie where it should; its folder need not exist yet.

    Args:
        target: The file to be.

    Raises:
        ImageWriteError: A folder on its way is a file or cannot be written to.
    """
    folder = target.parent
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise ImageWriteError(f"{target}: cannot be written, for {folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ImageWriteError(f"{target}: the folder {folder} is not writable; choose another")


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
    try:
        close = get_close_matches(name, os.listdir(folder or "."), n=1)
    except OSError:
        close = []
    hint = f"did you mean {os.path.join(folder, close[0])}?" if close else "check the path"
    return f"but does not exist; {hint}"


def _draft(inputs: Sequence[str], output: str | None, scale: float) -> list[_Draft]:
    tag = f"_x{scale:g}"
    drafts: dict[Path, _Draft] = {}  # a file that is named twice is read once
    for path in map(Path, inputs):
        if not path.is_dir():
            folder = path.parent if output is None else Path(output)
            found = [_Draft(path, folder, tag if output is None else "")]
        else:
            named = path if path.name not in ("", "..") else path.resolve()  # "." has no name
            if output is None:
                root = named.with_name(f"{named.name}{tag}")
            else:
                # As with `cp -r`: of several folders each keeps its name.
                root = Path(output) if len(inputs) == 1 else Path(output) / named.name
            found = list(_draft_folder(path, root, Path(output) if output else root))
        for draft in found:
            drafts.setdefault(draft.source.absolute(), draft)
    return list(drafts.values())


def _draft_folder(folder: Path, root: Path, output: Path) -> Iterator[_Draft]:
    """Mirror the images of a folder, without what an earlier run wrote inside it."""
    if os.path.realpath(folder) == os.path.realpath(root):
        raise UsageError(f"the output must not be the input folder {folder}; choose another")
    own_output = os.path.realpath(output)
    is_empty = True
    for place, folders, files in os.walk(folder, onerror=_raise):
        # Hidden ones hold no photographs: thumbnails and other systems' companions.
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(Path(place, name)) != own_output
        )
        for name in sorted(files):
            if Path(name).suffix.lower() in INPUT_SUFFIXES and not name.startswith("."):
                is_empty = False
                yield _Draft(Path(place, name), root / Path(place).relative_to(folder))
    if is_empty:
        raise UsageError(
            f"{folder} must hold images ({' '.join(sorted(INPUT_SUFFIXES))}), found none"
        )


def _raise(error: OSError) -> None:
    raise error


def _name_targets(drafts: Sequence[_Draft], suffix: str) -> list[Job]:
    """Name each result after its source, with the source's suffix kept where two would clash."""

    def key(draft: _Draft) -> str:
        # Some file systems do not tell A.png from a.png.
        return str(draft.target(suffix)).casefold()

    counts = Counter(map(key, drafts))
    return [Job(d.source, d.target(suffix, is_distinct=counts[key(d)] > 1)) for d in drafts]


def _check_targets(jobs: Sequence[Job]) -> None:
    sources = {os.path.realpath(job.source): job.source for job in jobs}
    seen: dict[str, Job] = {}
    for job in jobs:
        target = os.path.realpath(job.target)
        if target in sources:
            raise UsageError(
                f"the output of {job.source} would be {job.target}, which is an input; "
                "choose another output"
            )
        if target in seen:
            raise UsageError(
                f"{seen[target].source} and {job.source} would both become {job.target}; "
                "upscale them apart"
            )
        seen[target] = job
