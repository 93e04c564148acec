"""Samples of photographs that are known beforehand."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from tadsr.errors import DataError, ImageReadError
from tadsr.training.data.samples import (
    Sample,
    UnusablePhotoError,
    make_sample,
    read_photo,
)
from tadsr.training.data.sources import PhotoRecord
from tadsr.training.stopping import leave_signals_to_the_parent
from tadsr.training.training_config import DataConfig

MAX_SUBSTITUTIONS = 100
"""Unusable photographs in a row after which something must be wrong with all of them."""


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
