"""Residual addition that leaves the next GroupNorm's statistics behind."""

from __future__ import annotations

import torch
from torch import Tensor

from tadsr.kernels.backends import Backend, library, run_fastest, uses_triton
from tadsr.kernels.group_norm import check_num_groups, reference_statistics
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
        The sum, like `x`, in `torch.channels_last` from the kernel, and mean and biased variance
        of each group of it, (B, num_groups, 2), float32.

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
    tensors, arguments = (x, residual, channel_bias), (x, residual, channel_bias, num_groups)
    return run_fastest(torch.ops.tadsr.add_with_statistics, reference, tensors, arguments, backend)


def reference(
    x: Tensor, residual: Tensor, channel_bias: Tensor | None, num_groups: int
) -> tuple[Tensor, Tensor]:
    """Compute `add_with_statistics` with torch's own operations."""
    if channel_bias is not None:
        x = x + over_positions(channel_bias).to(x.dtype)
    total = x + residual
    return total, reference_statistics(total, num_groups)


library.define(
    "add_with_statistics(Tensor x, Tensor residual, Tensor? channel_bias, int num_groups) "
    "-> (Tensor, Tensor)"
)


@torch.library.impl(library, "add_with_statistics", "CompositeExplicitAutograd")
def _run(x: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    if uses_triton((x,)):
        from tadsr.kernels.gpu import add_with_statistics

        return add_with_statistics.add_with_statistics(x, *arguments)
    total, statistics = reference(x, *arguments)
    return total.contiguous(memory_format=torch.channels_last), statistics


@torch.library.register_fake("tadsr::add_with_statistics", lib=library)
def _fake(x: Tensor, residual: Tensor, channel_bias: Tensor | None, num_groups: int):
    statistics = x.new_empty((x.shape[0], num_groups, 2), dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.channels_last), statistics
