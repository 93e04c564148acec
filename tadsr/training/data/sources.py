"""Which photographs a folder or a list names, with their partners and captions."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed

from tadsr.errors import ImageReadError, TADSRWarning
from tadsr.folders.tagging import read_tags
from tadsr.image_files import find_images as find_photos
from tadsr.named_files import read_text
from tadsr.training.data.samples import (
    UNKNOWN_PX,
    Size,
    photo_size,
    read_photo,
)
from tadsr.training.training_config import DataConfig

_MAX_CHECKED = 30_000
"""Headers that are read before the first step: seconds on a disk of one's own."""
_HEADER_THREADS = 8
_NUM_COMPARED = 16
"""Pairs whose size and sharpness tell whether columns are swapped."""
SIDECAR = "sidecar"
"""Value of `DataConfig.captions` for a .txt beside each photograph."""
_NUM_NAMED = 3


class PhotoRecord(NamedTuple):
    """One photograph of a source."""

    hq: Path
    """The photograph."""
    lq: Path | None = None
    """Its LQ partner; None to degrade."""
    caption: str | None = None
    """What it shows; None takes the configured prompt."""


def list_folder(config: DataConfig) -> list[PhotoRecord]:
    """List the photographs of a folder with their captions, and partners where it has any."""
    root = Path(config.source)
    if not root.is_dir():
        raise ValueError(f"data source must be a folder of photographs, got {config.source}")
    photos = find_photos(root)
    if not photos:
        raise ValueError(f"data folder must hold photographs, but is empty of them: {root}")
    captions = find_captions(config.captions, root, photos)
    if config.lq is None:
        return [PhotoRecord(path, None, captions.get(path)) for path in photos]
    lq = Path(config.lq)
    if not lq.is_dir():
        raise ValueError(f"data.lq must be a folder of LQ partners, got {lq}")
    partners = {_key(path.relative_to(lq)): path for path in find_photos(lq)}
    keys = {path: _key(path.relative_to(root)) for path in photos}
    alone = [key for key in keys.values() if key not in partners]
    if alone:
        raise ValueError(
            f"every HQ must have an LQ partner of the same name in {lq}, but "
            f"{len(alone)} have none, first {alone[:5]}"
        )
    records = [PhotoRecord(hq, partners[key], captions.get(hq)) for hq, key in keys.items()]
    check_not_swapped(records, "data.source and data.lq")
    return records


def read_list(config: DataConfig) -> list[PhotoRecord]:
    """Read the published list format: a line has HQ, LQ and tags, apart by TABs or spaces.

    Paths are relative to the list's folder, or absolute. With TABs, paths may contain spaces.
    """
    path = Path(config.source)
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data list must be a readable text file: {error}") from error
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        fields = line.split("\t", 2) if "\t" in line else line.split(None, 2)
        if len(fields) < 2:
            raise ValueError(f"{path}, line {number}, must be 'HQ LQ tags', got {line!r}")
        hq, lq = (path.parent / field.strip() for field in fields[:2])
        caption = fields[2].strip() if len(fields) > 2 else None
        records.append(PhotoRecord(hq, lq, caption))
    if not records:
        raise ValueError(f"data list must name photographs, but is empty: {path}")
    check_not_swapped(records, f"the columns of {path}")
    return records


def check_not_swapped(records: list[PhotoRecord], what: str) -> None:
    """Raise ValueError if most of the first pairs have the sharper image as their LQ."""
    votes = []
    for record in records[:_NUM_COMPARED]:
        try:
            hq, lq = read_photo(record.hq), read_photo(record.lq)
        except (ImageReadError, ValueError):
            continue
        if hq.shape != lq.shape:
            votes.append(hq.size < lq.size)
        else:
            votes.append(_sharpness(hq) < _sharpness(lq))
    if votes and sum(votes) > len(votes) / 2:
        raise ValueError(
            f"{what} must be HQ first, then LQ, but in {sum(votes)} of {len(votes)} pairs the "
            "second image is larger or sharper; swap them"
        )


def leave_out_unusable(records: list[PhotoRecord], config: DataConfig) -> list[PhotoRecord]:
    """Leave out photographs that are too small or no images, by their headers, with a warning."""
    checked, later = records[:_MAX_CHECKED], records[_MAX_CHECKED:]
    # Around the threads: in them, one's filters would be left behind by another.
    with warnings.catch_warnings(), ThreadPoolExecutor(_HEADER_THREADS) as pool:
        warnings.simplefilter("ignore")  # of huge images, which are not decoded here
        sizes = list(pool.map(photo_size, [record.hq for record in checked]))
        partners = pool.map(photo_size, [record.lq or record.hq for record in checked])
        reasons = [_flaw(*pair, config) for pair in zip(sizes, partners, strict=True)]
    kept = [record for record, reason in zip(checked, reasons, strict=True) if not reason] + later
    counts = sorted(Counter(filter(None, reasons)).items())
    told = " and ".join(f"{count} {reason}" for reason, count in counts)
    if not kept:
        largest = max(min(size or (0, 0)) for size in sizes)
        raise ValueError(
            f"photographs must be at least data.crop_px ({config.crop_px}) px a side, with LQ "
            f"partners that fit if any, but of {len(records)} in {config.source} {told} (the "
            f"largest has a side of {largest} px); take a smaller data.crop_px or other photographs"
        )
    if told:
        num_out = f"{len(records) - len(kept)} of {len(records)} photographs in {config.source}"
        warnings.warn(f"{num_out} are left out: {told}", TADSRWarning, stacklevel=4)
    return kept


def _flaw(size: Size | None, partner: Size | None, config: DataConfig) -> str:
    """Return why a photograph cannot be trained on, judged by its header and its partner's."""
    if size is None:
        return "unreadable"
    if min(size) < config.crop_px:
        return f"below {config.crop_px} px"
    # The sides alone: a camera's pictures may have to be turned.
    fitting = [UNKNOWN_PX, size, tuple(side // config.scale for side in size)]
    is_fitting = size == UNKNOWN_PX or sorted(partner or ()) in map(sorted, fitting)
    return "" if is_fitting else "without a readable LQ of a fitting size"


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
    """Return what a photograph, its partner and its caption are matched by."""
    return name.with_suffix("").as_posix()


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NUM_NAMED])
    return f"{shown}, …" if len(names) > _NUM_NAMED else shown


def _is_main_process() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _sharpness(image: np.ndarray) -> float:
    """Return the variance of the Laplacian of the brightness."""
    gray = image.astype(np.float32).mean(2)
    middle = gray[1:-1, 1:-1]
    neighbours = gray[:-2, 1:-1] + gray[2:, 1:-1] + gray[1:-1, :-2] + gray[1:-1, 2:]
    return float((neighbours - 4 * middle).var())
