"""Samples and batches, and how they are cut from photographs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tadsr.degradation import (
    PRESETS,
    DegradationConfig,
    DegradationParams,
    apply_degradation,
    find_preset,
    sample_degradation,
)
from tadsr.images import decode_image, read_image, to_uint8
from tadsr.named_files import holds_something
from tadsr.training.training_config import DataConfig


@dataclass(frozen=True, eq=False)
class Sample:
    """One crop and its partner."""

    hq: Tensor
    """(3, S, S), float32, in [-1, 1]."""
    lq: Tensor | None
    """(3, s, s), at its own size; None where it is degraded on the device."""
    prompt: str
    """What it shows, or ""."""
    index: int
    """Global number, from which everything random about it follows."""
    degradation: DegradationParams | None
    """How its LQ is made; None where it is a stored one."""
    name: str
    """What was cropped."""
    skipped: tuple[str, ...]
    """What could not be used in its place, with the reason."""
    restored: Tensor | None = None
    """What a restoration network makes of the LQ, (3, S, S), in [-1, 1]; None without one."""

    def enlarged(self) -> Sample:
        """Return the sample with its LQ, if it has one, at the HQ's size."""
        size = self.hq.shape[-2:]
        if self.lq is None or self.lq.shape[-2:] == size:
            return self
        return replace(self, lq=upsample_lq(self.lq[None], size)[0])


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples of a step; see `Sample`."""

    hq: Tensor
    """(B, 3, S, S), float32, in [-1, 1]."""
    lq: Tensor | None
    """(B, 3, S, S), enlarged by bicubic; None before `to` where the device degrades."""
    prompts: tuple[str, ...]
    """One per sample."""
    indices: Tensor
    """(B,), int64, on the CPU."""
    degradations: tuple[DegradationParams, ...] | None
    """What `to` applies; None where LQ is there."""
    names: tuple[str, ...]
    """What was cropped."""
    skipped: tuple[str, ...]
    """What could not be used, with the reason."""
    restored: Tensor | None = None
    """What a restoration network makes of the LQ, (B, 3, S, S), in [-1, 1]; None without one."""

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.hq)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on a device, with the degradation applied where that is pending."""
        moved = self._map(lambda x: x.to(device, non_blocking=True))
        if moved.lq is not None:
            return moved
        hq = moved.hq
        lq = upsample_lq(apply_degradation(hq, self.degradations), hq.shape[-2:])
        return replace(moved, lq=lq, degradations=None)

    def pin_memory(self) -> Batch:
        """Return the batch in pinned memory, from where a GPU copies while it computes."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        images = {name: getattr(self, name) for name in ("hq", "lq", "restored")}
        return replace(self, **{n: change(x) for n, x in images.items() if x is not None})


def collate(samples: Sequence[Sample]) -> Batch:
    """Put samples of one size into a batch."""
    is_pending = samples[0].lq is None
    has_restored = samples[0].restored is not None
    return Batch(
        hq=torch.stack([s.hq for s in samples]),
        lq=None if is_pending else torch.stack([s.enlarged().lq for s in samples]),
        prompts=tuple(s.prompt for s in samples),
        indices=torch.tensor([s.index for s in samples], dtype=torch.int64),
        degradations=tuple(s.degradation for s in samples) if is_pending else None,
        names=tuple(s.name for s in samples),
        skipped=tuple(reason for s in samples for reason in s.skipped),
        restored=torch.stack([s.restored for s in samples]) if has_restored else None,
    )


def upsample_lq(lq: Tensor, size: Sequence[int]) -> Tensor:
    """Bring LQ images (B, 3, h, w) in [-1, 1] to the network's resolution by bicubic."""
    return F.interpolate(lq, tuple(size), mode="bicubic", antialias=True).clamp(-1, 1)


Size = tuple[int, int]
UNKNOWN_PX: Size = (10**6, 10**6)
_OTHER_LIBRARIES = (".tif", ".tiff", ".heic", ".heif", ".hif", ".jxl")
"""What Pillow may not open, but `read_image` does."""


def read_photo(path: Path) -> np.ndarray:
    """Read a photograph upright as uint8 (H, W, 3); raises ImageReadError or ValueError."""
    return to_uint8(decode_image(read_image(path)).rgb)


def photo_size(path: Path) -> Size | None:
    """Return a photograph's width and height in px from its header; None if it cannot be read.

    What Pillow does not know, such as wide TIFFs, is taken for large enough: it shows when decoded.
    """
    if not holds_something(path):
        return None
    try:
        with Image.open(path) as image:
            return image.size
    except Exception:  # a damaged file makes Pillow's plugins raise nearly anything
        return UNKNOWN_PX if path.suffix.lower() in _OTHER_LIBRARIES else None


class UnusablePhotoError(ValueError):
    """A photograph that can be read, but not trained on."""


def make_sample(
    photo: np.ndarray,
    partner: np.ndarray | None,
    caption: str | None,
    config: DataConfig,
    rng: np.random.Generator,
) -> Sample:
    """Cut a crop from a photograph and give it a partner and a prompt.

    Args:
        photo: uint8, (H, W, 3).
        partner: The LQ, uint8, at 1/scale or at the photo's size; None to degrade the crop.
        caption: What it shows; None takes the configured prompt.
    """
    height, width = photo.shape[:2]
    if min(height, width) < config.crop_px:
        raise UnusablePhotoError(
            f"must be at least {config.crop_px} px a side, got {width}×{height}"
        )
    turn = draw_turn(config, rng)
    degradation = None
    if partner is None:
        hq = turn(_cut_zoomed(photo, config, rng))
        degradation = sample_degradation(rng, _draw_preset(config, rng), scale=config.scale)
        lq = None
        if config.degrade_on == "worker":
            lq = apply_degradation(hq[None], degradation)[0]
    else:
        hq, lq = (turn(crop) for crop in _cut_pair(photo, partner, config, rng))
    prompt = config.prompt if caption is None else caption
    if rng.random() < config.prompt_dropout:
        prompt = ""
    return Sample(hq, lq, prompt, -1, degradation, "", ())


def _draw_preset(config: DataConfig, rng: np.random.Generator) -> DegradationConfig:
    share = rng.random()
    for name in ("bicubic", "mild", "web"):
        share -= getattr(config, f"{name}_probability")
        if share < 0:
            return PRESETS[name]
    return find_preset(config.degradation)


def _cut_zoomed(photo: np.ndarray, config: DataConfig, rng: np.random.Generator) -> Tensor:
    """Cut a random square as (3, S, S) in [-1, 1], from the photo shrunk at random."""
    height, width = photo.shape[:2]
    zoom = rng.uniform(config.min_zoom, 1.0)
    side = min(round(config.crop_px / zoom), height, width)
    crop = _to_tensor(_cut(photo, side, rng))
    if side != config.crop_px:
        size = (config.crop_px, config.crop_px)
        crop = F.interpolate(crop[None], size, mode="bicubic", antialias=True)[0].clamp(-1, 1)
    return crop


def _cut_pair(
    photo: np.ndarray, partner: np.ndarray, config: DataConfig, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Cut both at the same place; the LQ keeps its own resolution unless Lanczos enlarges it."""
    height, width = photo.shape[:2]
    if partner.shape[:2] == (height, width):
        scale = 1
    elif partner.shape[:2] == (height // config.scale, width // config.scale):
        scale = config.scale
    else:
        raise UnusablePhotoError(
            f"its LQ must be {width // config.scale}×{height // config.scale} or "
            f"{width}×{height} px, got {partner.shape[1]}×{partner.shape[0]}"
        )
    side = config.crop_px // scale
    rows, columns = partner.shape[:2]
    top, left = int(rng.integers(rows - side + 1)), int(rng.integers(columns - side + 1))
    lq = partner[top : top + side, left : left + side]
    if config.lq_resize == "lanczos" and scale > 1:
        size = (config.crop_px, config.crop_px)
        lq = np.array(Image.fromarray(lq).resize(size, Image.Resampling.LANCZOS))
    top, left, side = top * scale, left * scale, config.crop_px
    return _to_tensor(photo[top : top + side, left : left + side]), _to_tensor(lq)


def _cut(photo: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    top = int(rng.integers(photo.shape[0] - side + 1))
    left = int(rng.integers(photo.shape[1] - side + 1))
    return photo[top : top + side, left : left + side]


def draw_turn(config: DataConfig, rng: np.random.Generator) -> Callable[[Tensor], Tensor]:
    """Draw a mirroring and a rotation, to be applied to one or two crops alike."""
    is_flipped = config.flip and rng.random() < 0.5
    quarters = int(rng.integers(4)) if config.rotate else 0

    def turn(crop: Tensor) -> Tensor:
        crop = crop.flip(-1) if is_flipped else crop
        return torch.rot90(crop, quarters, (-2, -1))

    return turn


def _to_tensor(pixels: np.ndarray) -> Tensor:
    """Turn uint8 (H, W, 3) into (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1) / 127.5 - 1
