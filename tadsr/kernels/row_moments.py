"""Mean and spread of each row of activations: what bands of an image gather for a GroupNorm."""

from __future__ import annotations

import torch
from torch import Tensor

from tadsr.kernels.backends import Backend, register, run_fastest
from tadsr.kernels.per_channel import check_activations


def row_moments(x: Tensor, *, backend: Backend | None = None) -> Tensor:
    """Measure each channel of each row.

    Args:
        x: Activations, (B, C, H, W), fastest in `torch.channels_last`.
        backend: "triton" or "reference"; None takes Triton where it can run.

    Returns:
        Mean and sum of squared deviations, (2, B, H, C), float32.

    Raises:
        TypeError: `x` is not a float tensor.
        ValueError: A side is 0, or the chosen backend cannot run.
    """
    check_activations("x", x)
    return run_fastest(torch.ops.tadsr.row_moments, reference, (x,), (x,), backend)


def reference(x: Tensor) -> Tensor:
    """Compute `row_moments` with torch's own operations."""
    variance, mean = torch.var_mean(x.float(), dim=3, correction=0)
    return torch.stack([mean, variance * x.shape[3]]).transpose(2, 3).contiguous()


def _fake(x: Tensor) -> Tensor:
    batch, channels, height, _ = x.shape
    return x.new_empty((2, batch, height, channels), dtype=torch.float32)


register(
    "row_moments(Tensor x) -> Tensor",
    plan="statistics.plan_row_moments",
    reference=reference,
    fake=_fake,
)
