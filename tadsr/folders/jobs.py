"""Which image file becomes which: paths only, no pixels."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tadsr.errors import TADSRError
from tadsr.image_files import INPUT_SUFFIXES

_SCALE_TAG = re.compile(r"_(x\d+(\.\d+)?|\d+px)(?=$|\.)")
MANIFEST_NAME = "tadsr-manifest.jsonl"
"""In the folder of the results."""


@dataclass(frozen=True)
class Job:
    """One image to upscale.

    Args:
        source: The file to read.
        target: The file to write.
        folder: Output folder of a run over many images, which holds its manifest; else None.
        may_replace: Whether a `target` that exists is our own, damaged or of a try that ended
            half-way, and is replaced in any case.
        alone: Whether it must not share a batch, since it may be what ended a run.
        alternative: The PNG to write in place of `target` where the result does not fit that one's
            format, as transparent ones and animations do not fit JPEG; None for none.
        note: What is to be said of it, or empty.
        error: Why it cannot be done at all, or empty; `source` may then be a folder.
    """

    source: Path
    target: Path
    folder: Path | None = None
    alternative: Path | None = None
    note: str = ""
    may_replace: bool = False
    alone: bool = False
    error: str = ""


@dataclass(frozen=True)
class Draft:
    """A source whose result has a folder, but no name yet.

    Args:
        source: The file to read.
        folder: Where its result goes.
        tag: What follows the name's stem.
        suffix: Of the result, in place of the run's; empty for that one.
        root: Output folder of the whole run, or None.
        error: Why the source, which may be a folder, cannot be read; or empty.
    """

    source: Path
    folder: Path
    tag: str = ""
    suffix: str = ""
    root: Path | None = None
    error: str = ""

    def target(self, suffix: str, *, is_distinct: bool = False) -> Path:
        """Return the file to write, named with the source's suffix too if `is_distinct`."""
        base = self.source.name if is_distinct else self.source.stem
        return self.folder / f"{base}{self.tag}{self.suffix or suffix}"


def mirror_folder(source: str | Path, target: str | Path, suffix: str = ".png") -> list[Job]:
    """Plan to write each image of a folder to the same relative path in another folder.

    Returns:
        One job per image, in the order of the names, and at the end one with an `error` per folder
        that cannot be read.
    """
    source, target = Path(source), Path(target)
    if not source.is_dir():
        raise ValueError(f"source must be a folder, got {source}; check the path")
    jobs = name_targets(list(draft_folder(source, target, target)), suffix)
    check_targets(jobs)
    return jobs


def draft_folder(
    folder: Path, root: Path, output: Path, say: Callable[[str], None] = lambda line: None
) -> Iterator[Draft]:
    """Draft the images of a folder, without an earlier run's results inside it.

    Raises:
        OSError: The folder itself cannot be read.
    """
    if os.path.realpath(folder) == os.path.realpath(root):
        raise ValueError(f"the output must not be the input folder {folder}; choose another")
    own_output = os.path.realpath(output)
    is_empty = True
    closed: list[Draft] = []
    others: Counter[str] = Counter()

    def leave_out(error: OSError) -> None:
        path = Path(error.filename)
        if path == folder:
            raise error
        reason = f"{path}: must be a readable folder, got: {error.strerror}; it is left out"
        place = root / path.parent.relative_to(folder)
        closed.append(Draft(path, place, root=root, error=reason))

    for place, folders, files in os.walk(folder, onerror=leave_out):
        # Hidden ones hold no photographs: thumbnails and other systems' companions.
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(Path(place, name)) != own_output
        )
        for name in folders:
            if os.path.islink(Path(place, name)):
                say(
                    f"{Path(place, name)} is a link to a folder, which is left out; name it as well"
                )
        for name in sorted(files):
            suffix = Path(name).suffix.lower()
            if name.startswith(".") or name == MANIFEST_NAME:
                continue
            if suffix not in INPUT_SUFFIXES:
                others[suffix or "without a suffix"] += 1
                continue
            is_empty = False
            path = Path(place, name)
            yield Draft(path, root / Path(place).relative_to(folder), root=root)
    yield from closed
    if others:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
        say(f"{folder}: left out {kinds}; a file that is named itself may have any suffix")
    if is_empty and not closed:
        raise ValueError(
            f"{folder} must hold images ({' '.join(sorted(INPUT_SUFFIXES))}), found none"
        )


def name_targets(drafts: Sequence[Draft], suffix: str) -> list[Job]:
    """Name each result after its source, with the source's suffix kept where two would clash.

    Results listed in an earlier run's manifest keep their names.
    """
    made = {root: _sources_of(root) for root in {draft.root for draft in drafts} if root}
    settled, distinct = set(), set()
    for number, draft in enumerate(drafts):
        for names, is_distinct in ((settled, False), (distinct, True)):
            target = os.path.abspath(draft.target(suffix, is_distinct=is_distinct))
            if made.get(draft.root, {}).get(target) == draft.source.name:
                names.add(number)
                break
    while True:
        targets = [d.target(suffix, is_distinct=n in distinct) for n, d in enumerate(drafts)]
        # Some file systems do not tell A.png from a.png.
        keys = [str(target).casefold() for target in targets]
        counts = Counter(key for key, d in zip(keys, drafts, strict=True) if not d.error)
        # A name that keeps its suffix may be another's without: a.jpg and a.jpg.png.
        clashing = {n for n, key in enumerate(keys) if counts[key] > 1} - distinct - settled
        if not clashing:
            break
        distinct |= clashing
    taken = {*keys, *(str(draft.source).casefold() for draft in drafts)}
    return [
        Job(draft.source, target, draft.root, _alternative(target, taken), error=draft.error)
        for draft, target in zip(drafts, targets, strict=True)
    ]


def _alternative(target: Path, taken: set[str]) -> Path | None:
    if target.suffix == ".png":
        return None
    plain = target.with_suffix(".png")
    return target.with_name(f"{target.name}.png") if str(plain).casefold() in taken else plain


def _sources_of(root: Path) -> dict[str, str]:
    """Return what a run's finished results were made of: the source's name by the result's path."""
    from tadsr.folders.manifest import read_manifest  # which knows jobs

    finished = (record for record in read_manifest(root) if record.error is None)
    return {os.path.abspath(root / each.target): Path(each.source).name for each in finished}


def check_targets(jobs: Sequence[Job]) -> None:
    """Check that no result replaces an input or another result."""
    sources = {os.path.realpath(job.source): job.source for job in jobs}
    seen: dict[str, Job] = {}
    for job in (job for job in jobs if not job.error):
        target = os.path.realpath(job.target)
        if target in sources:
            raise ValueError(
                f"the output of {job.source} would be {job.target}, which is an input; "
                "choose another output"
            )
        if target in seen:
            raise ValueError(
                f"{seen[target].source} and {job.source} would both become {job.target}; "
                "upscale them apart"
            )
        seen[target] = job


def is_result_of(result: Path, source: Path, scale: float) -> bool:
    """Tell whether tadsr made a file, perhaps with other settings.

    Its EXIF says so; where there is none, as in BMP, a file is a result that is newer than its
    source and of just the size that it would have.
    """
    from tadsr.images import read_facts

    try:
        made = read_facts(result)
        if made.is_ours:
            return True
        size = read_facts(source).size
        expected = tuple(round(scale * side) for side in size)
        is_newer = os.path.getmtime(result) > os.path.getmtime(source)
    except (TADSRError, OSError):
        return False
    return scale > 1 and made.size == expected and is_newer


def untagged(path: Path) -> Path:
    """Return a path without suffix, and without the scale that a result's name ends with."""
    tag = _SCALE_TAG.search(path.stem)
    return path.with_name(path.stem[: tag.start()]) if tag else path.with_suffix("")


def leave_out_results(
    drafts: Sequence[Draft], scale: float, suffix: str, say: Callable[[str], None]
) -> list[Draft]:
    """Leave out files that an earlier run made from others of this run."""
    by_stem: dict[Path, list[Draft]] = {}
    for draft in drafts:
        by_stem.setdefault(draft.source.with_suffix(""), []).append(draft)
    targets = {os.path.abspath(draft.target(suffix)): draft for draft in drafts}
    kept = []
    for draft in drafts:
        path = draft.source
        origins = [targets[key]] if (key := os.path.abspath(path)) in targets else []
        origins += by_stem.get(untagged(path), [])
        origin = next(
            (o for o in origins if o is not draft and is_result_of(path, o.source, scale)), None
        )
        if origin is None:
            kept.append(draft)
        else:
            say(f"{path}: was made of {origin.source.name}, left out")
    return kept
