"""Photographs for `inherit.py`: some held out, others cut and degraded as training goes on."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tadsr.degradation import (
    PRESETS,
    DegradationConfig,
    apply_degradation,
    sample_degradation,
)
from tadsr.degradation.presets import BlurConfig, StageConfig
from tadsr.training import DataConfig
from tadsr.training.data import find_photos
from tadsr.training.data.listed import ListedPhotos
from tadsr.training.data.samples import Batch, numbers_of, read_photo
from tadsr.training.data.sources import PhotoRecord, leave_out_unusable

USUAL = {
    "degradation": "realesrgan",
    "bicubic_probability": 0.05,
    "web_probability": 0.3,
    "min_zoom": 0.5,
}
"""As strong as the web's; good photographs among them."""
CAMERA = {
    "degradation": DegradationConfig(
        stages=(
            StageConfig(
                blur=BlurConfig(sinc_probability=0.05, sigma_px=(0.5, 2.8)),
                resize_weights=(0.1, 0.2, 0.7),
                resize_factor=(0.6, 1.2),
                gaussian_probability=0.5,
                gaussian_sigma=(0.0, 6.0),
                poisson_scale=(0.0, 0.6),
                gray_probability=0.4,
                jpeg_quality=(75.0, 99.0),
            ),
        ),
        final_sinc_probability=0.2,
    ),
    "bicubic_probability": 0.0,
    "web_probability": 0.0,
    "min_zoom": 0.8,
    "max_zoom": 2.2,
}
"""A lens's blur, little noise, good JPEG; and originals that are soft at their full size. From
sharp ones alone the student learned to sharpen enlarged crops further than their originals."""
SAVED = {
    "degradation": DegradationConfig(
        stages=(
            StageConfig(
                blur=BlurConfig(probability=0.0),
                resize_weights=(0.0, 0.0, 1.0),
                resize_factor=(1.0, 1.0),
                gaussian_probability=1.0,
                gaussian_sigma=(0.0, 0.0),
                poisson_scale=(0.0, 0.0),
                gray_probability=0.0,
                jpeg_quality=(15.0, 75.0),
            ),
        ),
    ),
    "bicubic_probability": 0.0,
    "web_probability": 0.0,
    "min_zoom": 0.5,
}
"""A good photograph, shrunk and saved as a JPEG of few bytes: blocks, and no noise to hide them."""
KINDS = {"usual": USUAL, "camera": CAMERA, "saved": SAVED}
"""Kinds of samples, in the order of their numbers."""
PACKED_PX = 512
_PACKED_QUALITY = 84
_KIND_KEY = 3
"""Keeps the kind of a sample apart from other numbers drawn for it."""
_STAGE_SEED = 1_000_003
"""Keeps samples of the stages apart."""


def split_photos(folders: list[str], num_held_out: int) -> tuple[list[Path], list[Path]]:
    """Return photographs to train on, and those of the last folder that are kept apart.

    Which these are depends on their names alone, so that they stay the same once packed.
    """
    found = [find_photos(folder) for folder in folders]
    held_out = sorted(found[-1], key=lambda path: zlib.crc32(path.stem.encode()))[:num_held_out]
    return [p for paths in found for p in paths if p not in held_out], sorted(held_out)


def middle(photo: np.ndarray, side: int) -> np.ndarray:
    """Cut the square in the middle of a photograph, or what there is of it."""
    top, left = (max(0, (length - side) // 2) for length in photo.shape[:2])
    return photo[top : top + side, left : left + side]


def pack_photos(folders: list[str], output: str) -> None:
    """Write the middle of every photograph, to carry; folder by folder, as they came.

    Those that are held out of the last folder here are held out of the last one there.
    """
    size = 0
    for number, folder in enumerate(folders):
        target = Path(output) / f"{number:02d}"
        target.mkdir(parents=True, exist_ok=True)
        for path in find_photos(folder):
            packed = target / f"{path.stem}.webp"
            square = Image.fromarray(middle(read_photo(path), PACKED_PX))
            square.save(packed, quality=_PACKED_QUALITY)
            size += packed.stat().st_size
    print(f"{output}: {size / 2**20:.1f} MiB; --photos {output}/*")


class HeldOut:
    """Middles of photographs that nothing is trained on, degraded once and for all.

    Half of them by Real-ESRGAN's degradation, and half as pictures on the web are.
    """

    def __init__(self, paths: list[Path], side: int) -> None:
        pairs = []
        for number, path in enumerate(paths):
            square = middle(read_photo(path), side)
            if min(square.shape[:2]) < side:
                continue
            hq = to_images(torch.from_numpy(square.copy()).permute(2, 0, 1)[None])
            preset = PRESETS[("realesrgan", "web")[number % 2]]
            params = sample_degradation(np.random.default_rng([1, number]), preset)
            pairs.append((hq, apply_degradation(hq, params)))
        self.hq, self.lq = (torch.cat(images) for images in zip(*pairs, strict=True))


class Mixture(Dataset):
    """Samples of the same photographs, each degraded as its kind is.

    Args:
        kinds: Samples of each of `KINDS`.
        shares: Of all, of every kind but the first, each in [0, 1].
    """

    def __init__(self, kinds: list[ListedPhotos], shares: list[float]) -> None:
        self.kinds, self.bounds = kinds, np.cumsum(shares)

    def __getitem__(self, index: int) -> tuple[Batch, int]:
        """Make sample `index`, which is of the same kind whenever it is made, and name its kind."""
        draw = np.random.default_rng([self.kinds[0].seed, index, _KIND_KEY]).random()
        kind = int(np.searchsorted(self.bounds, draw, side="right")) + 1
        kind %= len(self.kinds)
        return self.kinds[kind][index], kind


class Pool:
    """Samples to draw batches from; one group after another is replaced by new ones.

    A sample is a function of seed, stage and its number, and so is what the pool holds after so
    many refreshments: a run that goes on makes it anew.

    Args:
        describe: What is kept of a group: tensors by name, of its HQ, its own size's LQ and its
            kinds' numbers.
        decoded: Photographs that are decoded; grows.
        refreshments: How many there have been.
        shares: Of samples of each kind but the first, in [0, 1], with a sum of at most 1.
    """

    def __init__(
        self,
        photos: list[Path],
        decoded: dict[Path, np.ndarray],
        *,
        stage: int,
        crop_px: int,
        size: int,
        group: int,
        workers: int,
        seed: int,
        refreshments: int,
        describe: Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]],
        device: torch.device,
        shares: list[float],
    ) -> None:
        config = DataConfig(
            "photos", crop_px=crop_px, rotate=True, num_workers=workers, **USUAL
        )  # fmt: skip
        records = leave_out_unusable([PhotoRecord(path) for path in photos], config)
        kinds = [
            ListedPhotos(records, replace(config, **facts), seed * _STAGE_SEED + stage)
            for facts in KINDS.values()
        ]
        for kind in kinds:
            kind.cache = decoded
        if not decoded:
            kinds[0].preload()
        dataset = Mixture(kinds, shares)
        self.groups = max(1, size // group)
        self.group, self.describe, self.device = group, describe, device
        numbers = numbers_of(group, refreshments * group, 0, 1)
        self.source = iter(
            DataLoader(
                dataset,
                batch_sampler=numbers,
                collate_fn=_join,
                num_workers=workers,
                worker_init_fn=_start_worker,
                prefetch_factor=4 if workers else None,
            )
        )
        self.kept: dict[str, Tensor] = {}
        self.number = refreshments
        for _ in range(self.groups):
            self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Replace the oldest group."""
        hq, lq, kinds = (values.to(self.device) for values in next(self.source))
        first = self.number % self.groups * self.group
        for name, values in self.describe(hq, lq, kinds).items():
            if name not in self.kept:
                shape = (self.groups * self.group, *values.shape[1:])
                self.kept[name] = values.new_empty(shape)
            self.kept[name][first : first + self.group] = values
        self.number += 1

    def draw(self, rng: np.random.Generator, count: int) -> dict[str, Tensor]:
        """Draw a batch."""
        total = self.groups * self.group
        rows = rng.choice(total, count, replace=count > total)
        rows = torch.from_numpy(rows).to(self.device)
        return {name: values[rows] for name, values in self.kept.items()}

    def close(self) -> None:
        """End the worker processes."""
        with contextlib.suppress(AttributeError):
            self.source._shutdown_workers()


def to_images(pixels: Tensor) -> Tensor:
    """Turn uint8 (B, 3, H, W) into [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_pixels(images: Tensor) -> Tensor:
    """Turn images in [-1, 1] into uint8."""
    return ((images + 1) * 127.5).round().clamp(0, 255).byte()


def chosen(is_first: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return images (B, C, H, W) of the first batch where it is to be, (B,), else the second."""
    return torch.where(is_first.view(-1, 1, 1, 1), first, second)


def _join(samples: list[tuple[Batch, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Join samples, their LQ at its own size, as few bytes; and their kinds."""
    batches, kinds = zip(*samples, strict=True)
    hq, lq = (to_pixels(torch.cat([getattr(b, name) for b in batches])) for name in ("hq", "lq"))
    return hq, lq, torch.tensor(kinds)


def _start_worker(_number: int) -> None:
    torch.set_num_threads(1)
