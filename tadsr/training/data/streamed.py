"""Sources that are read as they come: data sets on the hub, and WebDataset shards."""

from __future__ import annotations

import importlib
import io
import itertools
import json
import os
import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import numpy as np
from PIL import Image

from tadsr.errors import DataError, ImageReadError, import_extra
from tadsr.image_files import IMAGE_SUFFIXES
from tadsr.images import decode_image, to_uint8
from tadsr.training.data.samples import Batch, Photo, collate, make_sample, numbers_of
from tadsr.training.training_config import DataConfig

_BATCHES_AHEAD = 4
_LOOK_AHEAD = 32
"""Photographs of a stream, encoded, among which an unusable one finds its substitute."""
_ADDRESS = re.compile(r"(https?|hf|gs)://[\w.~:/?#@!&=%+,-]+")
"""Of a shard elsewhere; the library would also run commands."""
_CAPTION_SUFFIX = "txt"

Item = TypeVar("Item")


class StreamedData(ABC):
    """Samples of a source that can only be read from its beginning, made by threads.

    Each process reads a share of its own; its n-th sample is made of the first usable photograph at
    or after the share's n-th. Resuming reads, but does not decode, what was used.
    """

    description: str
    """What the source is, in a few words."""

    def __init__(self, config: DataConfig, seed: int) -> None:
        self.config = config
        self.seed = seed

    @abstractmethod
    def read(self, epoch: int, rank: int, num_processes: int) -> Iterator[Photo]:
        """Yield a process' share of an epoch, in an order that seed and epoch decide.

        Over all processes every photograph comes once.
        """

    def prompts(self) -> tuple[str, ...] | None:
        """Return None: a stream's captions are not known beforehand."""
        return None if self.config.caption_column else (self.config.prompt,)

    def batches(
        self,
        *,
        batch_size: int,
        first_sample: int = 0,
        rank: int = 0,
        num_processes: int = 1,
        pin_memory: bool = False,
    ) -> Generator[Batch, None, None]:
        """Yield batches without end, as `TrainingData.batches` does."""
        windows = _look_ahead(self._endless(rank, num_processes), _LOOK_AHEAD)
        mine = itertools.islice(windows, first_sample // num_processes, None)
        numbers = numbers_of(batch_size, first_sample, rank, num_processes)
        indices = itertools.chain.from_iterable(numbers)
        pending: deque[Future[Batch]] = deque()
        with ThreadPoolExecutor(max(1, self.config.num_workers)) as pool:
            try:
                while True:
                    while len(pending) < batch_size * _BATCHES_AHEAD:
                        pending.append(pool.submit(self._make, next(indices), next(mine)))
                    batch = collate([pending.popleft().result() for _ in range(batch_size)])
                    yield batch.pin_memory() if pin_memory else batch
            finally:
                for future in pending:
                    future.cancel()

    def _endless(self, rank: int, num_processes: int) -> Iterator[Photo]:
        for epoch in itertools.count():
            is_empty = True
            for photo in self.read(epoch, rank, num_processes):
                is_empty = False
                yield photo
            if is_empty:
                raise DataError(
                    f"{self.description} must hold photographs for each of {num_processes} "
                    f"processes, but gave number {rank} none"
                )

    def _make(self, index: int, window: tuple[Photo, ...]) -> Batch:
        rng = np.random.default_rng([self.seed, index])
        return make_sample(window, self.config, index, rng).enlarged()


class HubStream(StreamedData):
    """A data set of the Hugging Face hub, or a local folder of images or parquet files."""

    def __init__(self, config: DataConfig, seed: int) -> None:
        super().__init__(config, seed)
        datasets = _import_library("datasets")
        path = Path(config.source)
        try:
            if path.is_dir():
                parquet = sorted(map(str, path.rglob("*.parquet")))
                kind = {"path": "parquet", "data_files": {config.split: parquet}}
                if not parquet:
                    kind = {"path": "imagefolder", "data_dir": str(path)}
            else:
                kind = {"path": config.source}
            dataset = datasets.load_dataset(**kind, split=config.split, streaming=True)
            columns = dataset.column_names or list(next(iter(dataset)))
        except Exception as error:  # the library raises many types
            raise ValueError(
                f"data.source must be a data set that can be read, but {config.source} (split "
                f"{config.split}) cannot: {error}"
            ) from error
        wanted = {config.image_column, config.caption_column} - {None}
        if not wanted <= set(columns):
            raise ValueError(
                f"data.image_column and data.caption_column must be among the columns "
                f"{', '.join(columns)}, got {', '.join(sorted(wanted))}"
            )
        # Undecoded, so that one broken image does not end the stream.
        image = datasets.Image(decode=False)
        self.dataset = dataset.cast_column(config.image_column, image)
        self.description = f"the data set {path.name if path.is_dir() else config.source}"

    def read(self, epoch: int, rank: int, num_processes: int) -> Iterator[Photo]:
        """Yield a process' share of an epoch."""
        config = self.config
        mixed = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0])
        shuffled = self.dataset.shuffle(seed=mixed, buffer_size=config.shuffle_buffer)
        if num_processes > 1:
            # Whole files where their number is a multiple, else one photograph in so many.
            split = importlib.import_module("datasets.distributed").split_dataset_by_node
            shuffled = split(shuffled, rank, num_processes)
        for number, row in enumerate(shuffled):
            image = row[config.image_column]
            encoded, path = image.get("bytes"), image.get("path")
            if encoded is None and path and self._is_own(path):
                encoded = Path(path).read_bytes()
            caption = row[config.caption_column] if config.caption_column else None
            name = path or f"row {number} of epoch {epoch}"
            yield Photo(name, caption, partial(_decode, encoded or b""))

    def _is_own(self, path: str) -> bool:
        """Tell whether a path is a file of the data set's folder; rows could name any other."""
        folder = os.path.realpath(self.config.source)
        return os.path.isfile(path) and Path(os.path.realpath(path)).is_relative_to(folder)


class ShardStream(StreamedData):
    """WebDataset shards: tar files whose members belong together by their stem."""

    def __init__(self, config: DataConfig, seed: int) -> None:
        super().__init__(config, seed)
        self.webdataset = _import_library("webdataset")
        path = Path(config.source)
        if path.is_dir():
            self.shards = sorted(map(str, path.glob("*.tar")))
        else:
            self.shards = list(importlib.import_module("braceexpand").braceexpand(config.source))
        missing = [s for s in self.shards if not _ADDRESS.fullmatch(s) and not Path(s).is_file()]
        if missing or not self.shards:
            raise ValueError(
                f"data.source must name WebDataset shards that exist, got {config.source}"
                + (f"; missing: {missing[:3]}" if missing else "")
            )
        # Whole paths: the library runs what follows "pipe:" as a command, were it a file's name.
        self.shards = [s if _ADDRESS.fullmatch(s) else os.path.abspath(s) for s in self.shards]
        self.description = f"{len(self.shards)} shards of {path.name}"

    def read(self, epoch: int, rank: int, num_processes: int) -> Iterator[Photo]:
        """Yield a process' share of an epoch."""
        rng = np.random.default_rng([self.seed, epoch])
        shards = [self.shards[i] for i in rng.permutation(len(self.shards))]
        # Whole shards, as many for each; of those that are left over one photograph in so many.
        split = len(shards) - len(shards) % num_processes
        own, common = self._parse(shards[:split][rank::num_processes]), self._parse(shards[split:])
        mine = itertools.chain(own, itertools.islice(common, rank, None, num_processes))
        return shuffle_buffered(mine, self.config.shuffle_buffer, rng)

    def _parse(self, shards: list[str]) -> Iterator[Photo]:
        suffix = self.config.caption_column or _CAPTION_SUFFIX
        if not shards:
            return
        dataset = self.webdataset.WebDataset(
            shards,
            shardshuffle=False,
            nodesplitter=iter,
            workersplitter=iter,
            handler=self.webdataset.warn_and_continue,
        )
        for row in dataset:
            images = [k for k in row if f".{k.rpartition('.')[2].lower()}" in IMAGE_SUFFIXES]
            if not images:
                continue
            caption = row.get(suffix)
            if isinstance(caption, bytes):
                caption = caption.decode("utf-8", errors="replace").strip()
            elif "json" in row:
                caption = json.loads(row["json"]).get("caption")
            name = f"{Path(str(row.get('__url__', ''))).name}/{row['__key__']}"
            yield Photo(name, caption, partial(_decode, row[images[0]]))


def shuffle_buffered(
    items: Iterable[Item], buffer_size: int, rng: np.random.Generator
) -> Iterator[Item]:
    """Yield items in an order that is random within a buffer."""
    buffer: list[Item] = []
    for item in items:
        if len(buffer) < buffer_size:
            buffer.append(item)
            continue
        place = int(rng.integers(buffer_size))
        chosen, buffer[place] = buffer[place], item
        yield chosen
    for place in rng.permutation(len(buffer)):
        yield buffer[int(place)]


def _look_ahead(items: Iterator[Item], length: int) -> Iterator[tuple[Item, ...]]:
    """Yield each item with the `length` − 1 items after it."""
    window = deque(itertools.islice(items, length))
    while window:
        yield tuple(window)
        window.popleft()
        window.extend(itertools.islice(items, 1))


def _decode(encoded: bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return to_uint8(decode_image(image).rgb)
    except Exception as error:  # damaged data makes decoders raise nearly anything
        raise ImageReadError(repr(error)) from error


def _import_library(name: str) -> ModuleType:
    needs = f"this data source needs the library {name}"
    return import_extra(name, needs, "data", error=DataError)
