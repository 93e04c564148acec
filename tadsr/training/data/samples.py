"""Samples and batches, and how they are cut from photographs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

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
from tadsr.errors import DataError, ImageReadError
from tadsr.images import decode_image, read_image, to_uint8
from tadsr.named_files import holds_something
from tadsr.training.training_config import DataConfig

Size = tuple[int, int]
UNKNOWN_PX: Size = (10**6, 10**6)
_OTHER_LIBRARIES = (".tif", ".tiff", ".heic", ".heif", ".hif", ".jxl")
"""What Pillow may not open, but `read_image` does."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples of a step: crops of photographs and their partners. A sample is a batch of one."""

    hq: Tensor
    """(B, 3, S, S), float32, in [-1, 1]."""
    lq: Tensor | None
    """(B, 3, S, S), enlarged by bicubic, or a sample's at its own size; None before `to` where the
    device degrades."""
    prompts: tuple[str, ...]
    """What each shows, or ""."""
    indices: Tensor
    """Global numbers, from which everything random follows; (B,), int64, on the CPU."""
    degradations: tuple[DegradationParams, ...] | None
    """What `to` applies; None where LQ is there."""
    names: tuple[str, ...]
    """What was cropped."""
    skipped: tuple[str, ...]
    """What could not be used, with the reason."""
    restored: Tensor | None = None
    """What a restoration network makes of the LQ, (B, 3, S, S), in [-1, 1]; None without one."""

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on a device, with the degradation applied where that is pending."""
        moved = self._map(lambda x: x.to(device, non_blocking=True))
        if moved.lq is not None:
            return moved
        lq = apply_degradation(moved.hq, self.degradations)
        return replace(moved, lq=lq, degradations=None).enlarged()

    def enlarged(self) -> Batch:
        """Return the batch with its LQ, if it has one, at the HQ's size."""
        size = self.hq.shape[-2:]
        if self.lq is None or self.lq.shape[-2:] == size:
            return self
        return replace(self, lq=upsample_lq(self.lq, size))

    def pin_memory(self) -> Batch:
        """Return the batch in pinned memory, from where a GPU copies while it computes."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        images = {name: getattr(self, name) for name in ("hq", "lq", "restored")}
        return replace(self, **{n: change(x) for n, x in images.items() if x is not None})


def collate(samples: Sequence[Batch]) -> Batch:
    """Join samples of one size and kind to a batch."""

    def join(name: str) -> Tensor | tuple | None:
        values = [getattr(sample.enlarged(), name) for sample in samples]
        if isinstance(values[0], Tensor):
            return torch.cat(values)
        return None if values[0] is None else sum(values, ())

    return Batch(**{name: join(name) for name in Batch.__dataclass_fields__})


def upsample_lq(lq: Tensor, size: Sequence[int]) -> Tensor:
    """Bring LQ images (B, 3, h, w) in [-1, 1] to the network's resolution by bicubic."""
    return F.interpolate(lq, tuple(size), mode="bicubic", antialias=True).clamp(-1, 1)


def numbers_of(
    batch_size: int, first_sample: int, rank: int, num_processes: int
) -> Iterator[range]:
    """Return the sample numbers of each batch of one process among several, without end."""
    starts = itertools.count(first_sample + rank * batch_size, batch_size * num_processes)
    return (range(start, start + batch_size) for start in starts)


class Photo(NamedTuple):
    """A photograph that a sample may be made of."""

    name: str
    """What errors call it."""
    caption: str | None
    """What it shows; None takes the configured prompt."""
    read: Callable[[], np.ndarray]
    """Gives its pixels, uint8 (H, W, 3); raises ImageReadError or ValueError."""
    read_lq: Callable[[], np.ndarray] | None = None
    """The same for its LQ, at 1/scale or at the photograph's size; None degrades the crop."""


def make_sample(
    photos: Iterable[Photo], config: DataConfig, index: int, rng: np.random.Generator
) -> Batch:
    """Make a sample of the first photograph that can be used.

    Raises:
        DataError: None of them can be used.
    """
    skipped: list[str] = []
    for photo in photos:
        try:
            partner = None if photo.read_lq is None else photo.read_lq()
            hq, lq, degradation = _cut_sample(photo.read(), partner, config, rng)
        except (ImageReadError, ValueError) as error:
            reason = str(error)
            skipped.append(reason if photo.name in reason else f"{photo.name}: {reason}")
            continue
        prompt = config.prompt if photo.caption is None else photo.caption
        if rng.random() < config.prompt_dropout:
            prompt = ""
        return Batch(
            hq=hq[None],
            lq=None if lq is None else lq[None],
            prompts=(prompt,),
            indices=torch.tensor([index]),
            degradations=None if degradation is None or lq is not None else (degradation,),
            names=(photo.name,),
            skipped=tuple(skipped),
        )
    raise DataError(
        f"{len(skipped)} photographs in a row could not be used, the last one: {skipped[-1]}"
    )


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


def draw_turn(config: DataConfig, rng: np.random.Generator) -> Callable[[Tensor], Tensor]:
    """Draw a mirroring and a rotation, to be applied to one or two crops alike."""
    is_flipped = config.flip and rng.random() < 0.5
    quarters = int(rng.integers(4)) if config.rotate else 0

    def turn(crop: Tensor) -> Tensor:
        crop = crop.flip(-1) if is_flipped else crop
        return torch.rot90(crop, quarters, (-2, -1))

    return turn


def _cut_sample(
    photo: np.ndarray, partner: np.ndarray | None, config: DataConfig, rng: np.random.Generator
) -> tuple[Tensor, Tensor | None, DegradationParams | None]:
    """Return an HQ crop, its LQ if it is there by now, and how it is degraded if it is."""
    height, width = photo.shape[:2]
    if min(height, width) < config.crop_px:
        raise ValueError(f"must be at least {config.crop_px} px a side, got {width}×{height}")
    turn = draw_turn(config, rng)
    if partner is not None:
        hq, lq = map(turn, _cut_pair(photo, partner, config, rng))
        return hq, lq, None
    hq = turn(_cut_zoomed(photo, config, rng))
    degradation = sample_degradation(rng, _draw_preset(config, rng), scale=config.scale)
    if config.degrade_on == "device":
        return hq, None, degradation
    return hq, apply_degradation(hq[None], degradation)[0], degradation


def _draw_preset(config: DataConfig, rng: np.random.Generator) -> DegradationConfig:
    share = rng.random()
    for name in ("bicubic", "mild", "web"):
        share -= getattr(config, f"{name}_probability")
        if share < 0:
            return PRESETS[name]
    return find_preset(config.degradation)


def _cut_zoomed(photo: np.ndarray, config: DataConfig, rng: np.random.Generator) -> Tensor:
    """Cut a random square as (3, S, S) in [-1, 1], from the photo resized at random."""
    zoom = rng.uniform(config.min_zoom, config.max_zoom)
    side = min(round(config.crop_px / zoom), *photo.shape[:2])
    top, left = _draw_corner(photo, side, rng)
    crop = _to_tensor(photo[top : top + side, left : left + side])
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
        raise ValueError(
            f"its LQ must be {width // config.scale}×{height // config.scale} or "
            f"{width}×{height} px, got {partner.shape[1]}×{partner.shape[0]}"
        )
    side = config.crop_px // scale
    top, left = _draw_corner(partner, side, rng)
    lq = partner[top : top + side, left : left + side]
    if config.lq_resize == "lanczos" and scale > 1:
        size = (config.crop_px, config.crop_px)
        lq = np.array(Image.fromarray(lq).resize(size, Image.Resampling.LANCZOS))
    top, left, side = top * scale, left * scale, config.crop_px
    return _to_tensor(photo[top : top + side, left : left + side]), _to_tensor(lq)


def _draw_corner(photo: np.ndarray, side: int, rng: np.random.Generator) -> tuple[int, int]:
    """Draw where a square begins, from the top and from the left."""
    height, width = photo.shape[:2]
    return int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))


def _to_tensor(pixels: np.ndarray) -> Tensor:
    """Turn uint8 (H, W, 3) into (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1) / 127.5 - 1
