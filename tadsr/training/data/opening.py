"""Open a source of training samples, whatever it is."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from tadsr.checkpoints.detect import HUB_ID
from tadsr.image_files import find_images as find_photos
from tadsr.training.data.listed import ListedPhotos
from tadsr.training.data.restored import RestoredSamples, Restorer
from tadsr.training.data.samples import Batch, collate, numbers_of
from tadsr.training.data.sources import PhotoRecord, leave_out_unusable, list_folder, read_list
from tadsr.training.data.streamed import HubStream, ShardStream, StreamedData
from tadsr.training.stopping import leave_signals_to_the_parent
from tadsr.training.training_config import DEFAULT_CROP_PX, DataConfig

_PREFETCH_BATCHES = 4


class TrainingData:
    """Samples of photographs that are known beforehand."""

    def __init__(
        self,
        records: list[PhotoRecord],
        config: DataConfig,
        seed: int,
        restorer: Restorer | None = None,
    ) -> None:
        self.records = records
        self.config = config
        self.dataset: ListedPhotos | RestoredSamples = ListedPhotos(records, config, seed)
        if config.restored is not None:
            plain = replace(config, flip=False, rotate=False, degrade_on="worker")
            self.dataset = RestoredSamples(
                ListedPhotos(records, plain, config.restored.seed), config, seed, restorer
            )
        kind = "photos" if records[0].lq is None else "pairs"
        self.description = f"{len(records)} {kind} in {Path(config.source).name}"

    def prompts(self) -> tuple[str, ...] | None:
        """Return all prompts that samples can have, or None where they are not known."""
        config = self.config
        found = {config.prompt if r.caption is None else r.caption for r in self.records}
        if config.prompt_dropout > 0:
            found.add("")
        return tuple(sorted(found))

    def prepare(self, device: torch.device, rank: int = 0, num_processes: int = 1) -> None:
        """Compute samples that are to be kept and are not there yet."""
        if isinstance(self.dataset, RestoredSamples):
            self.dataset.prepare(device, rank, num_processes)

    def batches(
        self,
        *,
        batch_size: int,
        first_sample: int = 0,
        rank: int = 0,
        num_processes: int = 1,
        pin_memory: bool = False,
    ) -> Generator[Batch, None, None]:
        """Yield batches without end; close the generator to end its worker processes."""
        dataset = self.dataset
        if self.config.cache_photos and isinstance(dataset, ListedPhotos) and not dataset.cache:
            dataset.preload()
        workers = self.config.num_workers
        loader = DataLoader(
            dataset,
            batch_sampler=numbers_of(batch_size, first_sample, rank, num_processes),
            collate_fn=collate,
            num_workers=workers,
            prefetch_factor=_PREFETCH_BATCHES if workers else None,
            worker_init_fn=_start_worker,
            pin_memory=pin_memory,
        )
        iterator = iter(loader)
        try:
            yield from iterator
        finally:
            # At once, not with the last traceback that holds the iterator: until then torch's
            # handler of ending children raises the death of a worker wherever the process is.
            if workers:
                iterator._shutdown_workers()


def _start_worker(_number: int) -> None:
    """Limit a worker process to one thread, and let its parent end it."""
    torch.set_num_threads(1)
    leave_signals_to_the_parent()


def open_data(
    config: DataConfig, *, seed: int, restorer: Restorer | None = None
) -> TrainingData | StreamedData:
    """List or open what a run trains on."""
    if config.crop_px is None:
        config = replace(config, crop_px=DEFAULT_CROP_PX)
    kind = _detect_kind(config) if config.kind == "auto" else config.kind
    if kind == "pairs" and config.lq is None:
        raise ValueError("data.lq must name the folder of LQ partners for kind 'pairs'")
    if kind in ("huggingface", "webdataset"):
        if config.restored is not None:
            raise ValueError(
                f"data.restored must be left out for kind {kind!r}: its samples are of photographs "
                "known beforehand; store some of the stream's in a folder"
            )
        if config.lq is not None or config.captions is not None:
            raise ValueError(
                f"data.lq and data.captions must be left out for kind {kind!r}: a stream carries "
                "its captions (data.caption_column), and is degraded on the fly"
            )
        return (HubStream if kind == "huggingface" else ShardStream)(config, seed)
    if kind == "list" and config.captions is not None:
        raise ValueError(
            "data.captions must be left out for kind 'list': captions are its third column"
        )
    records = read_list(config) if kind == "list" else list_folder(config)
    return TrainingData(leave_out_unusable(records, config), config, seed, restorer)


def _detect_kind(config: DataConfig) -> str:
    path = Path(config.source)
    if path.is_dir():
        has_shards = any(path.glob("*.tar")) and not find_photos(path)
        return "webdataset" if has_shards else "folder"
    if path.suffix == ".txt":
        return "list"
    if config.source.endswith(".tar"):
        return "webdataset"
    if HUB_ID.fullmatch(config.source) and not path.exists():
        return "huggingface"
    return "folder"
