"""Captions of a folder's photographs, from sidecars or from one file."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch.distributed

from tadsr.errors import TADSRWarning
from tadsr.folders.tagging import read_tags
from tadsr.named_files import read_text

SIDECAR = "sidecar"
"""Value of `DataConfig.captions` for a .txt beside each photograph."""
_NUM_NAMED = 3


def find_captions(captions: str | None, root: Path, photos: Sequence[Path]) -> dict[Path, str]:
    """Find the captions of photographs.

    Args:
        captions: "sidecar", a file of `tadsr tag` (*.jsonl), or one of lines "relative
            name<TAB>caption", whose names may have any suffix; None for none.
    """
    if captions is None:
        return {}
    if captions == SIDECAR:
        named = {path: path.with_suffix(".txt") for path in photos}
        found = {p: read_text(t).strip() for p, t in named.items() if t.is_file()}
        place, unused = "the .txt files beside them", []
    else:
        known = _read_file(Path(captions))
        keys = {path: _key(path.relative_to(root)) for path in photos}
        found = {path: known[key] for path, key in keys.items() if key in known}
        place, unused = captions, sorted(known.keys() - set(keys.values()))
    lacking = [path.relative_to(root).as_posix() for path in photos if path not in found]
    if not found:
        raise ValueError(
            f"data.captions must describe the photographs in {root}, but {place} matches none of "
            f"{len(photos)}: it lacks {_some(lacking)}"
            + (f" and has {_some(unused)}" if unused else "")
        )
    problems = []
    if lacking:
        problems.append(
            f"{len(lacking)} of {len(photos)} photographs have no caption ({_some(lacking)}) and "
            "train on data.prompt"
        )
    if unused:
        problems.append(f"{len(unused)} captions name no photograph ({_some(unused)})")
    if problems and _is_main_process():
        warnings.warn(f"{place}: {'; '.join(problems)}", TADSRWarning, stacklevel=2)
    return found


def _read_file(path: Path) -> dict[str, str]:
    if path.suffix == ".jsonl":
        return {_key(Path(name)): tags for name, tags in read_tags(path).items()}
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"data.captions must be 'sidecar' or a readable file of captions: {error}"
        ) from error
    found = {}
    for number, line in enumerate(lines, 1):
        name, separator, caption = line.partition("\t")
        if separator:
            found[_key(Path(name.strip()))] = caption.strip()
        elif line.strip():
            raise ValueError(
                f"{path}, line {number}, must be 'relative name<TAB>caption', got {line!r}"
            )
    return found


def _key(name: Path) -> str:
    return name.with_suffix("").as_posix()


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NUM_NAMED])
    return f"{shown}, …" if len(names) > _NUM_NAMED else shown


def _is_main_process() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
