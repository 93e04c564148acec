"""Sources whose photographs are known beforehand: folders, pairs and list files."""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from tadsr.errors import DataError, ImageReadError
from tadsr.image_files import find_images as find_photos
from tadsr.named_files import read_text
from tadsr.training.data.batch import Sample
from tadsr.training.data.captions import find_captions
from tadsr.training.data.data_config import DataConfig
from tadsr.training.data.photos import (
    UNKNOWN_PX,
    Size,
    UnusablePhotoError,
    make_sample,
    photo_size,
    read_photo,
)
from tadsr.training.interruption import leave_signals_to_the_parent

MAX_SUBSTITUTIONS = 100
"""Unusable photographs in a row after which something must be wrong with all of them."""
_MAX_CHECKED = 30_000
"""Headers that are read before the first step: seconds on a disk of one's own."""
_HEADER_THREADS = 8
_NUM_COMPARED = 16
"""Pairs whose size and sharpness tell whether columns are swapped."""


@dataclass(frozen=True)
class PhotoRecord:
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
    partners = None if config.lq is None else _index_by_name(Path(config.lq))
    records, alone = [], []
    for path in photos:
        key = path.relative_to(root).with_suffix("").as_posix()
        partner = None
        if partners is not None:
            partner = partners.get(key)
            if partner is None:
                alone.append(key)
                continue
        records.append(PhotoRecord(path, partner, captions.get(path)))
    if alone:
        raise ValueError(
            f"every HQ must have an LQ partner of the same name in {config.lq}, but "
            f"{len(alone)} have none, first {alone[:5]}"
        )
    if partners is not None:
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


class ShuffledEpochs:
    """Numbers 0..count − 1 over and over, each epoch in an order of its own."""

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.seed = seed
        self._epoch, self._order = -1, np.empty(0, int)

    def __getitem__(self, index: int) -> int:
        """Return the number at a place in the endless sequence."""
        epoch, place = divmod(index, self.count)
        if self._epoch != epoch:
            self._order = np.random.default_rng([self.seed, epoch, 1]).permutation(self.count)
            self._epoch = epoch
        return int(self._order[place])


def leave_out_unusable(
    records: list[PhotoRecord], config: DataConfig
) -> tuple[list[PhotoRecord], str]:
    """Leave out photographs that are too small or no images, by their headers."""
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
    num_out = len(records) - len(kept)
    if not num_out:
        return kept, ""
    return kept, f"{num_out} of {len(records)} photographs in {config.source} are left out: {told}"


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


class ListedPhotos(Dataset):
    """Sample i is a function of the configuration, the seed and i alone.

    An epoch goes over every photograph once, in an order drawn from the seed.
    """

    def __init__(self, records: list[PhotoRecord], config: DataConfig, seed: int) -> None:
        self.records = records
        self.config = config
        self.seed = seed
        self.cache: dict[Path, np.ndarray] = {}
        self.broken: dict[Path, str] = {}
        self._order = ShuffledEpochs(len(records), seed)

    def preload(self) -> None:
        """Decode all photographs into memory, before worker processes share it."""
        for record in self.records:
            for path in filter(None, (record.hq, record.lq)):
                with suppress(ImageReadError, ValueError):  # reported when its turn comes
                    self.cache[path] = self._read(path)

    def __getitem__(self, index: int) -> Sample:
        """Make sample `index`; other photographs take the place of unusable ones."""
        rng = np.random.default_rng([self.seed, index])
        record = self.records[self._order[index]]
        skipped: list[str] = []
        while True:
            try:
                partner = None if record.lq is None else self._read(record.lq)
                photo = self._read(record.hq)
                sample = make_sample(photo, partner, record.caption, self.config, rng)
            except (ImageReadError, UnusablePhotoError, ValueError) as error:
                reason = str(error)
                name = str(record.hq)
                skipped.append(reason if name in reason else f"{name}: {reason}")
            else:
                return dataclasses.replace(
                    sample, index=index, name=str(record.hq), skipped=tuple(skipped)
                )
            if len(skipped) >= MAX_SUBSTITUTIONS:
                raise DataError(
                    f"{len(skipped)} photographs in a row could not be used, the last one: "
                    f"{skipped[-1]}"
                )
            record = self.records[int(rng.integers(len(self.records)))]

    def _read(self, path: Path) -> np.ndarray:
        if path in self.cache:
            return self.cache[path]
        if path in self.broken:  # decoding it again would fail again
            raise ImageReadError(self.broken[path])
        try:
            return read_photo(path)
        except (ImageReadError, ValueError) as error:
            self.broken[path] = str(error)
            raise


class SharedIndices(Sampler):
    """Endless batches of sample numbers: those of one process among several."""

    def __init__(self, batch_size: int, first_sample: int, rank: int, num_processes: int) -> None:
        self.batch_size = batch_size
        self.start = first_sample + rank * batch_size
        self.stride = batch_size * num_processes

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the numbers of each batch."""
        start = self.start
        while True:
            yield list(range(start, start + self.batch_size))
            start += self.stride


def start_worker(_number: int) -> None:
    """Limit a worker process to one thread, and let its parent end it."""
    torch.set_num_threads(1)
    leave_signals_to_the_parent()


def _index_by_name(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise ValueError(f"data.lq must be a folder of LQ partners, got {folder}")
    photos = find_photos(folder)
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in photos}


def _sharpness(image: np.ndarray) -> float:
    """Return the variance of the Laplacian of the brightness."""
    gray = image.astype(np.float32).mean(2)
    middle = gray[1:-1, 1:-1]
    neighbours = gray[:-2, 1:-1] + gray[2:, 1:-1] + gray[1:-1, :-2] + gray[1:-1, 2:]
    return float((neighbours - 4 * middle).var())
