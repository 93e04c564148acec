"""Samples and batches as the trainer gets them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tadsr.degradation import DegradationParams, apply_degradation


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
