"""Samples of photographs that are known beforehand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from tadsr.errors import ImageReadError
from tadsr.training.data.samples import Batch, Photo, make_sample, read_photo
from tadsr.training.data.sources import PhotoRecord
from tadsr.training.training_config import DataConfig

MAX_SUBSTITUTIONS = 100
"""Unusable photographs in a row after which something must be wrong with all of them."""


def draw_in_epochs(index: int, count: int, seed: int) -> int:
    """Return which of `count` items comes at a place of an endless sequence of shuffled epochs."""
    epoch, place = divmod(index, count)
    return int(_shuffle(count, seed, epoch)[place])


@lru_cache(maxsize=2)
def _shuffle(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, 1]).permutation(count)


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

    def preload(self) -> None:
        """Decode all photographs into memory, before worker processes share it."""
        for record in self.records:
            for path in filter(None, (record.hq, record.lq)):
                with suppress(ImageReadError, ValueError):  # reported when its turn comes
                    self.cache[path] = self._read(path)

    def __getitem__(self, index: int) -> Batch:
        """Make sample `index`; other photographs take the place of unusable ones."""
        rng = np.random.default_rng([self.seed, index])
        return make_sample(self._candidates(index, rng), self.config, index, rng)

    def _candidates(self, index: int, rng: np.random.Generator) -> Iterator[Photo]:
        number = draw_in_epochs(index, len(self.records), self.seed)
        for _ in range(MAX_SUBSTITUTIONS):
            hq, lq, caption = self.records[number]
            read_lq = None if lq is None else partial(self._read, lq)
            yield Photo(str(hq), caption, partial(self._read, hq), read_lq)
            number = int(rng.integers(len(self.records)))

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
