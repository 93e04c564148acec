"""Residual addition that leaves the next GroupNorm's statistics behind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tadsr.kernels.backends import Backend, register, run_fastest
from tadsr.kernels.gpu.launch import choose_chunks
from tadsr.kernels.group_norm import check_num_groups, reference_moments, reference_statistics
from tadsr.kernels.per_channel import check_activations, check_per_channel, over_positions


def add_with_statistics(
    x: Tensor,
    residual: Tensor,
    *,
    channel_bias: Tensor | None = None,
    num_groups: int,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a residual and a bias, and measure the sum for the next `group_norm_silu`.

    Args:
        x: Activations, (B, C, H, W), fastest in `torch.channels_last`.
        residual: Added to `x`, same shape and dtype.
        channel_bias: Added too, (C,), (1, C) or (B, C); None for 0.
        num_groups: Groups of the next GroupNorm; divides C.
        backend: "triton" or "reference"; None takes Triton where it can run.

    Returns:
        The sum, like `x`, in `torch.channels_last` from the kernel, and its statistics, float32:
        mean and biased variance of each group, (B, num_groups, 2); or where `group_norm_silu` had
        better merge them, mean and sum of squared deviations of each channel over chunks of equal
        length but for the last, (2, B, chunks, C).

    Raises:
        TypeError: `x` is not a float tensor.
        ValueError: A shape does not fit, or the chosen backend cannot run.
    """
    check_activations("x", x)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"residual must be {tuple(x.shape)} of {x.dtype} as x is, "
            f"got {tuple(residual.shape)} of {residual.dtype}"
        )
    check_num_groups(num_groups, x.shape[1])
    check_per_channel("channel_bias", channel_bias, *x.shape[:2])
    chunks, is_merged_on_use = choose_chunks(x)
    num_chunks = chunks if is_merged_on_use else 0
    tensors = (x, residual, channel_bias)
    arguments = (*tensors, num_groups, num_chunks)
    return run_fastest(torch.ops.tadsr.add_with_statistics, reference, tensors, arguments, backend)


def reference(
    x: Tensor, residual: Tensor, channel_bias: Tensor | None, num_groups: int, num_chunks: int
) -> tuple[Tensor, Tensor]:
    """Compute `add_with_statistics` with torch's own operations."""
    if channel_bias is not None:
        x = x + over_positions(channel_bias).to(x.dtype)
    total = x + residual
    if num_chunks:
        return total, reference_moments(total, num_chunks)
    return total, reference_statistics(total, num_groups)


def _in_channels_last(*arguments: Any) -> tuple[Tensor, Tensor]:
    total, statistics = reference(*arguments)
    return total.contiguous(memory_format=torch.channels_last), statistics


def _fake(
    x: Tensor, residual: Tensor, channel_bias: Tensor | None, num_groups: int, num_chunks: int
) -> tuple[Tensor, Tensor]:
    batch, channels = x.shape[:2]
    shape = (2, batch, num_chunks, channels) if num_chunks else (batch, num_groups, 2)
    statistics = x.new_empty(shape, dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.channels_last), statistics


register(
    "add_with_statistics(Tensor x, Tensor residual, Tensor? channel_bias, int num_groups, "
    "int num_chunks) -> (Tensor, Tensor)",
    plan="add_with_statistics.plan_add_with_statistics",
    reference=_in_channels_last,
    fake=_fake,
)
