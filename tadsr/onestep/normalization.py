"""GroupNorm and SiLU for a CPU: in pieces that fit its caches, and exact in channels_last.

torch's own GroupNorm sums a channels_last image into one float32 per channel, which loses 2e-5 of
the result at 512 × 512.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PIECE_BYTES = 2**19
"""Rows of positions that are read and written while they are in the second-level cache."""


def group_norm_silu_in_pieces(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    silu: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """Normalize groups of channels and activate.

    Args:
        x: (B, C, H, W), channels_last.
        weight: Factor per channel, (C,) or (B, C).
        bias: Offset per channel, (C,) or (B, C).
        out: Overwritten; shaped and laid out as `x`, which it may be. None for a new tensor.

    Source: Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm (1979).
    """
    batch, channels, height, width = x.shape
    positions = x.permute(0, 2, 3, 1).view(batch, height * width, channels)
    out = torch.empty_like(x) if out is None else out
    targets = out.permute(0, 2, 3, 1).view_as(positions)
    weight, bias = (values.expand(batch, -1).double() for values in (weight, bias))
    rows = max(1, PIECE_BYTES // (channels * x.element_size()))
    for sample, target, gain, offset in zip(positions, targets, weight, bias, strict=True):
        pieces = sample.split(rows)
        mean, variance = _moments(pieces)
        grouped = mean.view(num_groups, -1)
        group_mean = grouped.mean(dim=1, keepdim=True)
        spread = variance.view(num_groups, -1) + (grouped - group_mean).square()
        inverse = (spread.mean(dim=1, keepdim=True) + eps).rsqrt()
        factor = gain * inverse.expand_as(grouped).reshape(-1)
        offset = offset - group_mean.expand_as(grouped).reshape(-1) * factor
        wide = torch.promote_types(x.dtype, torch.float32)
        factor, offset = factor.to(wide), offset.to(wide)
        for piece, written in zip(pieces, target.split(rows), strict=True):
            is_wide = piece.dtype == written.dtype == wide
            normed = torch.addcmul(offset, piece, factor, out=written if is_wide else None)
            if silu:
                F.silu(normed, inplace=True)
            if not is_wide:
                written.copy_(normed)
    return out


def _moments(pieces: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each channel over pieces (n, C), float64."""
    means, deviations = [], []
    for piece in pieces:
        wide = piece.float() if piece.element_size() < 4 else piece
        mean = wide.mean(dim=0)
        means.append(mean)
        deviations.append((wide - mean).square_().sum(dim=0))
    counts = torch.tensor([[len(piece)] for piece in pieces], dtype=torch.float64)
    means = torch.stack(means).double()
    share = counts / counts.sum()
    mean = (share * means).sum(dim=0)
    within = torch.stack(deviations).double().sum(dim=0) / counts.sum()
    return mean, within + (share * (means - mean).square()).sum(dim=0)
