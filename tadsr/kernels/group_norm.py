"""GroupNorm with what is around it in a ResNet block, and what measures activations for it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tadsr.kernels.backends import Backend, register, run_fastest
from tadsr.kernels.gpu.launch import choose_chunks


def check_per_channel(name: str, values: Tensor | None, batch: int, channels: int) -> None:
    """Check that values are (C,), (1, C) or (B, C).

    Raises:
        ValueError: They are not.
    """
    if values is None or values.shape in ((channels,), (1, channels), (batch, channels)):
        return
    raise ValueError(
        f"{name} must be ({channels},), (1, {channels}) or ({batch}, {channels}), "
        f"got {tuple(values.shape)}"
    )


def check_activations(name: str, x: Tensor) -> None:
    """Check that a tensor is float (B, C, H, W) with elements.

    Raises:
        TypeError: It is not a float tensor.
        ValueError: It has another number of dimensions, or a side of 0.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        found = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a floating-point tensor, not {found}")
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(
            f"{name} must have the shape (B, C, H, W), no side 0, got {tuple(x.shape)}"
        )


def over_positions(values: Tensor) -> Tensor:
    """Shape values per channel so that they broadcast over (B, C, H, W)."""
    return values if values.ndim == 4 else values.reshape(-1, values.shape[-1], 1, 1)


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    silu: bool = True,
    channel_bias: Tensor | None = None,
    statistics: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Normalize groups of channels and activate.

    y = SiLU(GroupNorm(x + channel_bias)), with statistics in float32. Values "per channel" are
    (C,), (1, C) or (B, C), of any float dtype; a modulation by time is folded into weight and bias.

    Args:
        x: Activations, (B, C, H, W), fastest in `torch.channels_last`.
        num_groups: Groups of neighbouring channels; divides C.
        weight: Factor per channel after the normalization; None for 1.
        bias: Offset per channel after the normalization; None for 0.
        eps: Added to the variance.
        silu: Whether SiLU ends it.
        channel_bias: Added to `x` first, per channel, such as the preceding convolution's bias;
            None for 0.
        statistics: Mean and biased variance of each group of x + channel_bias,
            (B, num_groups, 2), float32; or what `add_with_statistics` returns with `x`; None
            computes them.
        backend: "triton" or "reference"; None takes Triton where it can run.

    Returns:
        A tensor like `x`; in `torch.channels_last` from the kernel.

    Raises:
        TypeError: `x` is not a float tensor.
        ValueError: A shape does not fit, or the chosen backend cannot run.

    Source: Wu and He, Group Normalization (2018).
    """
    check_activations("x", x)
    batch, channels = x.shape[:2]
    check_num_groups(num_groups, channels)
    for name, values in (("weight", weight), ("bias", bias), ("channel_bias", channel_bias)):
        check_per_channel(name, values, batch, channels)
    if statistics is not None:
        merged, parts = (batch, num_groups, 2), (2, batch, *statistics.shape[2:3], channels)
        if statistics.shape not in (merged, parts):
            raise ValueError(
                f"statistics must be {merged} or (2, {batch}, chunks, {channels}), "
                f"got {tuple(statistics.shape)}"
            )
    tensors = (x, weight, bias, channel_bias, statistics)
    arguments = (x, num_groups, weight, bias, eps, silu, channel_bias, statistics)
    kernel = torch.ops.tadsr.group_norm_silu
    return run_fastest(kernel, group_norm_reference, tensors, arguments, backend)


def group_norm_reference(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool = True,
    channel_bias: Tensor | None = None,
    statistics: Tensor | None = None,
) -> Tensor:
    """Compute `group_norm_silu` with torch's own operations, in x's dtype as torch does."""
    if statistics is not None and statistics.ndim == 4:
        statistics = merge_moments(statistics, num_groups, x.shape[2] * x.shape[3], channel_bias)
    if channel_bias is not None:
        x = x + over_positions(channel_bias).to(x.dtype)
    is_shared = all(values is None or values.ndim == 1 for values in (weight, bias))
    if is_shared and statistics is None:
        weight, bias = (None if v is None else v.to(x.dtype) for v in (weight, bias))
        y = F.group_norm(x, num_groups, weight, bias, eps)
    else:
        y = _normalize(x, num_groups, eps, statistics)
        if weight is not None:
            y = y * over_positions(weight).to(x.dtype)
        if bias is not None:
            y = y + over_positions(bias).to(x.dtype)
    return F.silu(y) if silu else y


def reference_statistics(x: Tensor, num_groups: int) -> Tensor:
    """Return mean and biased variance of each group, (B, num_groups, 2), float32."""
    variance, mean = torch.var_mean(x.float().reshape(x.shape[0], num_groups, -1), -1, correction=0)
    return torch.stack([mean, variance], dim=-1)


def reference_moments(x: Tensor, num_chunks: int) -> Tensor:
    """Return mean and sum of squared deviations per channel and chunk, (2, B, chunks, C)."""
    values = x.float().flatten(2)
    chunk = -(-values.shape[2] // num_chunks)
    values = F.pad(values, (0, num_chunks * chunk - values.shape[2])).unflatten(2, (-1, chunk))
    counts = _counts(x.shape[2] * x.shape[3], num_chunks, x.device)
    mean = values.sum(-1) / counts
    is_inside = torch.arange(chunk, device=x.device) < counts[:, None]
    deviation = ((values - mean[..., None]).square() * is_inside).sum(-1)
    return torch.stack([mean, deviation]).transpose(2, 3).contiguous()


def merge_moments(
    moments: Tensor, num_groups: int, positions: int, channel_bias: Tensor | None = None
) -> Tensor:
    """Merge `reference_moments` to mean and biased variance of groups, (B, num_groups, 2)."""
    mean, deviation = moments.float()
    if channel_bias is not None:
        mean = mean + channel_bias.reshape(-1, 1, channel_bias.shape[-1])
    counts = _counts(positions, mean.shape[1], mean.device)[:, None]
    total = positions * (mean.shape[2] // num_groups)

    def in_groups(values: Tensor) -> Tensor:
        return values.unflatten(2, (num_groups, -1)).sum((1, 3)) / total

    center = in_groups(counts * mean)
    between = mean - center.repeat_interleave(mean.shape[2] // num_groups, dim=1)[:, None]
    variance = in_groups(deviation + counts * between.square())
    return torch.stack([center, variance], dim=-1)


def _counts(positions: int, num_chunks: int, device: torch.device) -> Tensor:
    chunk = -(-positions // num_chunks)
    starts = chunk * torch.arange(num_chunks, device=device)
    return (positions - starts).clamp(max=chunk).float()


def check_num_groups(num_groups: int, channels: int) -> None:
    """Check that groups divide channels.

    Raises:
        ValueError: They do not.
    """
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups must divide the {channels} channels, got {num_groups}")


def _normalize(x: Tensor, num_groups: int, eps: float, statistics: Tensor | None) -> Tensor:
    if statistics is None:
        return F.group_norm(x, num_groups, eps=eps)
    mean, variance = statistics.repeat_interleave(x.shape[1] // num_groups, dim=1).unbind(-1)
    deviation = (variance + eps).sqrt()
    return ((x.float() - over_positions(mean)) / over_positions(deviation)).to(x.dtype)


register(
    "group_norm_silu(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, "
    "bool silu, Tensor? channel_bias, Tensor? statistics) -> Tensor",
    plan="group_norm.plan_group_norm_silu",
    reference=lambda *given: group_norm_reference(*given).contiguous(
        memory_format=torch.channels_last
    ),
    fake=lambda x, *_: torch.empty_like(x, memory_format=torch.channels_last),
)


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
    return run_fastest(
        torch.ops.tadsr.add_with_statistics, add_reference, tensors, arguments, backend
    )


def add_reference(
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
    total, statistics = add_reference(*arguments)
    return total.contiguous(memory_format=torch.channels_last), statistics


def _fake_sum(
    x: Tensor, residual: Tensor, channel_bias: Tensor | None, num_groups: int, num_chunks: int
) -> tuple[Tensor, Tensor]:
    batch, channels = x.shape[:2]
    shape = (2, batch, num_chunks, channels) if num_chunks else (batch, num_groups, 2)
    statistics = x.new_empty(shape, dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.channels_last), statistics


register(
    "add_with_statistics(Tensor x, Tensor residual, Tensor? channel_bias, int num_groups, "
    "int num_chunks) -> (Tensor, Tensor)",
    plan="statistics.plan_add_with_statistics",
    reference=_in_channels_last,
    fake=_fake_sum,
)


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
    return run_fastest(torch.ops.tadsr.row_moments, row_moments_reference, (x,), (x,), backend)


def row_moments_reference(x: Tensor) -> Tensor:
    """Compute `row_moments` with torch's own operations."""
    variance, mean = torch.var_mean(x.float(), dim=3, correction=0)
    return torch.stack([mean, variance * x.shape[3]]).transpose(2, 3).contiguous()


def _fake_row_moments(x: Tensor) -> Tensor:
    batch, channels, height, _ = x.shape
    return x.new_empty((2, batch, height, channels), dtype=torch.float32)


register(
    "row_moments(Tensor x) -> Tensor",
    plan="statistics.plan_row_moments",
    reference=row_moments_reference,
    fake=_fake_row_moments,
)
