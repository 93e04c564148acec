"""Open a source of training samples, whatever it is."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

from torch.utils.data import DataLoader

from tadsr.training.data.batch import Batch, collate
from tadsr.training.data.config import DataConfig
from tadsr.training.data.listed import (
    ListedPhotos,
    Record,
    SharedIndices,
    limit_threads,
    list_folder,
    read_list,
)

_PREFETCH_BATCHES = 4


class TrainingData:
    """Samples of photographs that are known beforehand.

    Args:
        records: The photographs.
        config: How samples are made of them.
        seed: The run's seed.
    """

    def __init__(self, records: list[Record], config: DataConfig, seed: int) -> None:
        self.records = records
        self.config = config
        self.dataset = ListedPhotos(records, config, seed)
        kind = "photos" if records[0].lq is None else "pairs"
        self.description = f"{len(records)} {kind} in {Path(config.source).name}"

    def prompts(self) -> tuple[str, ...] | None:
        """Return all prompts that samples can have, or None where they are not known."""
        config = self.config
        found = {config.prompt if r.caption is None else r.caption for r in self.records}
        if config.prompt_dropout > 0:
            found.add("")
        return tuple(sorted(found))

    def batches(
        self,
        *,
        batch_size: int,
        first_sample: int = 0,
        rank: int = 0,
        num_processes: int = 1,
        pin_memory: bool = False,
    ) -> Generator[Batch, None, None]:
        """Yield batches without end; close the generator to end its worker processes.

        Args:
            batch_size: Samples per batch of this process.
            first_sample: Samples that all processes have used before.
            rank: This process, from 0.
            num_processes: All of them.
            pin_memory: Whether batches come in pinned memory.
        """
        if self.config.cache_photos and not self.dataset.cache:
            self.dataset.preload()
        workers = self.config.num_workers
        loader = DataLoader(
            self.dataset,
            batch_sampler=SharedIndices(batch_size, first_sample, rank, num_processes),
            collate_fn=collate,
            num_workers=workers,
            prefetch_factor=_PREFETCH_BATCHES if workers else None,
            worker_init_fn=limit_threads,
            pin_memory=pin_memory,
        )
        iterator = iter(loader)
        try:
            yield from iterator
        finally:
            del iterator, loader


def open_data(config: DataConfig, *, seed: int) -> TrainingData:
    """List or open what a run trains on.

    Args:
        config: The source.
        seed: The run's seed.

    Returns:
        The samples.

    Raises:
        ValueError: Nothing usable is there, HQ and LQ are swapped or do not match, or a caption
            file is malformed.
    """
    kind = _detect_kind(config) if config.kind == "auto" else config.kind
    if kind == "list":
        return TrainingData(read_list(config), config, seed)
    return TrainingData(list_folder(config), config, seed)


def _detect_kind(config: DataConfig) -> str:
    path = Path(config.source)
    if path.suffix == ".txt":
        return "list"
    return "folder"
