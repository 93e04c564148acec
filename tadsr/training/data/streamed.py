"""Sources that are read as they come: data sets on the hub, and WebDataset shards."""

from __future__ import annotations

import dataclasses
import importlib
import io
import itertools
import json
import os
import re
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from PIL import Image

from tadsr.errors import DataError, import_extra
from tadsr.image_files import IMAGE_SUFFIXES
from tadsr.images import decode_image, to_uint8
from tadsr.training.data.samples import Batch, Sample, UnusablePhotoError, collate, make_sample
from tadsr.training.training_config import DataConfig

_BATCHES_AHEAD = 4
_LOOK_AHEAD = 32
"""Photographs of a stream, encoded, among which an unusable one finds its substitute."""
_ADDRESS = re.compile(r"(https?|hf|gs)://[\w.~:/?#@!&=%+,-]+")
"""Of a shard elsewhere; the library would also run commands."""
_CAPTION_SUFFIX = "txt"

Item = TypeVar("Item")


class RawPhoto(NamedTuple):
    """An encoded photograph of a stream."""

    encoded: bytes
    """An image file's content."""
    caption: str | None
    """What it shows, or None."""
    name: str
    """What errors call it."""


class Share(NamedTuple):
    """Which part of a stream a process reads; over all of them every photograph once an epoch."""

    rank: int = 0
    num_processes: int = 1


class PhotoStream(Protocol):
    """A source that can only be read from its beginning."""

    description: str
    """What it is, in a few words."""

    def read(self, seed: int, epoch: int, share: Share) -> Iterator[RawPhoto]:
        """Yield a share's photographs once, in an order that seed and epoch decide."""


class HubStream:
    """A data set of the Hugging Face hub, or a local folder of images or parquet files."""

    def __init__(self, config: DataConfig) -> None:
        datasets = _import_library("datasets")
        self.config = config
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

    def read(self, seed: int, epoch: int, share: Share) -> Iterator[RawPhoto]:
        """Yield a share's photographs once, in an order that seed and epoch decide."""
        config = self.config
        shuffled = self.dataset.shuffle(seed=_mix(seed, epoch), buffer_size=config.shuffle_buffer)
        if share.num_processes > 1:
            # Whole files where their number is a multiple, else one photograph in so many.
            split = importlib.import_module("datasets.distributed").split_dataset_by_node
            shuffled = split(shuffled, *share)
        for number, row in enumerate(shuffled):
            image = row[config.image_column]
            encoded, path = image.get("bytes"), image.get("path")
            if encoded is None and path and self._is_own(path):
                encoded = Path(path).read_bytes()
            caption = row[config.caption_column] if config.caption_column else None
            yield RawPhoto(encoded or b"", caption, path or f"row {number} of epoch {epoch}")

    def _is_own(self, path: str) -> bool:
        """Tell whether a path is a file of the data set's folder; rows could name any other."""
        folder = os.path.realpath(self.config.source)
        return os.path.isfile(path) and Path(os.path.realpath(path)).is_relative_to(folder)


class ShardStream:
    """WebDataset shards: tar files whose members belong together by their stem."""

    def __init__(self, config: DataConfig) -> None:
        self.webdataset = _import_library("webdataset")
        self.config = config
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

    def read(self, seed: int, epoch: int, share: Share) -> Iterator[RawPhoto]:
        """Yield a share's photographs once, in an order that seed and epoch decide."""
        rng = np.random.default_rng([seed, epoch])
        shards = [self.shards[i] for i in rng.permutation(len(self.shards))]
        rank, count = share
        # Whole shards, as many for each; of those that are left over one photograph in so many.
        split = len(shards) - len(shards) % count
        own, common = self._parse(shards[:split][rank::count]), self._parse(shards[split:])
        mine = itertools.chain(own, itertools.islice(common, rank, None, count))
        return shuffle_buffered(mine, self.config.shuffle_buffer, rng)

    def _parse(self, shards: list[str]) -> Iterator[RawPhoto]:
        suffix = self.config.caption_column or _CAPTION_SUFFIX
        if not shards:
            return
        dataset = self.webdataset.WebDataset(
            shards,
            shardshuffle=False,
            nodesplitter=_keep_all,
            workersplitter=_keep_all,
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
            yield RawPhoto(row[images[0]], caption, name)


class StreamedData:
    """Samples of a stream, made by threads while the network computes.

    Each process reads a share of its own; its n-th sample is made of the first usable photograph at
    or after the share's n-th. Resuming reads, but does not decode, what was used.
    """

    def __init__(self, source: PhotoStream, config: DataConfig, seed: int) -> None:
        self.source = source
        self.config = config
        self.seed = seed
        self.description = source.description

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
        windows = _look_ahead(self._endless(Share(rank, num_processes)), _LOOK_AHEAD)
        mine = itertools.islice(windows, first_sample // num_processes, None)
        # Process r makes batch r of each round of batches.
        rounds = itertools.count(first_sample + rank * batch_size, num_processes * batch_size)
        indices = (start + i for start in rounds for i in range(batch_size))
        pending: deque[Future[Sample]] = deque()
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

    def _endless(self, share: Share) -> Iterator[RawPhoto]:
        for epoch in itertools.count():
            is_empty = True
            for photo in self.source.read(self.seed, epoch, share):
                is_empty = False
                yield photo
            if is_empty:
                raise DataError(
                    f"{self.description} must hold photographs for each of {share.num_processes} "
                    f"processes, but gave number {share.rank} none"
                )

    def _make(self, index: int, window: tuple[RawPhoto, ...]) -> Sample:
        """Make sample `index` of the first usable photograph of a window."""
        rng = np.random.default_rng([self.seed, index])
        skipped: list[str] = []
        for raw in window:
            try:
                photo = _decode(raw.encoded)
                sample = make_sample(photo, None, raw.caption, self.config, rng)
            except Exception as error:  # damaged data makes decoders raise nearly anything
                reason = str(error) if isinstance(error, UnusablePhotoError) else repr(error)
                skipped.append(f"{raw.name}: {reason}")
            else:
                named = dataclasses.replace(
                    sample, index=index, name=raw.name, skipped=tuple(skipped)
                )
                return named.enlarged()
        raise DataError(
            f"{len(skipped)} photographs in a row could not be used, the last one: {skipped[-1]}"
        )


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
    with Image.open(io.BytesIO(encoded)) as image:
        return to_uint8(decode_image(image).rgb)


def _mix(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


def _keep_all(sources: Iterable[Item]) -> Iterable[Item]:
    """Leave the shards of a share together."""
    return sources


def _import_library(name: str) -> ModuleType:
    needs = f"this data source needs the library {name}"
    return import_extra(name, needs, "data", error=DataError)
