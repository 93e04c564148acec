"""Which files tadsr has made itself, so that the same command does not take them for photos."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from tadsr.errors import TADSRError
from tadsr.folders.jobs import Draft

_SCALE_TAG = re.compile(r"_(x\d+(\.\d+)?|\d+px)(?=$|\.)")


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
