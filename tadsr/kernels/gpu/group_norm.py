"""GroupNorm, modulation and SiLU: one program per group if small, else split over positions."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tadsr.kernels.gpu.launch import (
    SIZES,
    Launch,
    ceil_divide,
    choose_tile,
    next_power_of_2,
    per_channel,
    run_launches,
)
from tadsr.kernels.gpu.statistics import plan_statistics

WHOLE_GROUP_ELEMENTS = 16384
"""Largest group, padded to powers of two, that one program keeps in its registers."""
WHOLE_GROUP_ROWS = 4096
"""Most positions of such a group."""
APPLIED_ELEMENTS = 2048
"""Elements of a block: 16 for each thread of 4 warps."""
APPLIED_BLOCKS = 4
"""Blocks of one program, which share what they load per channel."""


@triton.jit
def load_channels(values, stride, sample, channel, mask, neutral):
    """Load values per channel in float32, or the neutral one where there are none."""
    if values is not None:
        loaded = tl.load(values + sample * stride + channel, mask=mask, other=0.0).to(tl.float32)
    else:
        loaded = tl.full(channel.shape, neutral, tl.float32)
    return loaded


@triton.jit
def load_affine(
    weight,
    weight_stride,
    bias,
    bias_stride,
    scale,
    scale_stride,
    shift,
    shift_stride,
    sample,
    channel,
    mask,
):
    """Fold the affine and the modulation: (n·w + b)·(1 + scale) + shift = n·factor + offset."""
    factor = load_channels(weight, weight_stride, sample, channel, mask, 1.0)
    offset = load_channels(bias, bias_stride, sample, channel, mask, 0.0)
    modulation = 1.0 + load_channels(scale, scale_stride, sample, channel, mask, 0.0)
    added = load_channels(shift, shift_stride, sample, channel, mask, 0.0)
    return factor * modulation, offset * modulation + added


@triton.jit
def activate(y, SILU: tl.constexpr):
    """Apply SiLU, or nothing."""
    if SILU:
        y = y * tl.sigmoid(y)
    return y


@triton.jit(do_not_specialize=SIZES)
def apply_kernel(
    x,
    y,
    statistics,
    channel_bias,
    channel_bias_stride,
    weight,
    weight_stride,
    bias,
    bias_stride,
    scale,
    scale_stride,
    shift,
    shift_stride,
    positions,
    channels,
    num_groups,
    eps,
    num_channel_blocks,
    GROUP_SIZE: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
):
    """Normalize by known statistics."""
    first = (tl.program_id(0) // num_channel_blocks) * (BLOCK_ROWS * NUM_BLOCKS)
    block = tl.program_id(0) % num_channel_blocks
    sample = tl.program_id(1).to(tl.int64)
    channel = block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    is_channel = channel < channels
    at = statistics + (sample * num_groups + channel // GROUP_SIZE) * 2
    mean = tl.load(at, mask=is_channel, other=0.0)
    variance = tl.load(at + 1, mask=is_channel, other=1.0)
    factor, offset = load_affine(
        weight, weight_stride, bias, bias_stride, scale, scale_stride, shift, shift_stride,
        sample, channel, is_channel,
    )  # fmt: skip
    factor = (factor / tl.sqrt(variance + eps))[None, :]
    offset = offset[None, :]
    added = load_channels(channel_bias, channel_bias_stride, sample, channel, is_channel, 0.0)
    center = (mean - added)[None, :]
    start = sample * positions * channels
    for i in tl.static_range(NUM_BLOCKS):
        row = first + i * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = (row < positions)[:, None] & is_channel[None, :]
        at = start + row.to(tl.int64)[:, None] * channels + channel[None, :]
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        # The mean goes first: folded into the offset it would cancel where it is large.
        value = activate((value - center) * factor + offset, SILU)
        tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def whole_group_kernel(
    x,
    y,
    channel_bias,
    channel_bias_stride,
    weight,
    weight_stride,
    bias,
    bias_stride,
    scale,
    scale_stride,
    shift,
    shift_stride,
    positions,
    channels,
    eps,
    group_elements,
    GROUP_SIZE: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Measure and normalize one group of one sample, read once."""
    lane = tl.arange(0, BLOCK_CHANNELS)
    channel = tl.program_id(0) * GROUP_SIZE + lane
    is_channel = lane < GROUP_SIZE
    sample = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, BLOCK_ROWS)
    mask = (row < positions)[:, None] & is_channel[None, :]
    at = sample * positions * channels + row.to(tl.int64)[:, None] * channels + channel[None, :]
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    added = load_channels(channel_bias, channel_bias_stride, sample, channel, is_channel, 0.0)
    value = tl.where(mask, value + added[None, :], 0.0)
    mean = tl.sum(tl.sum(value, axis=1), axis=0) / group_elements
    value = tl.where(mask, value - mean, 0.0)
    variance = tl.sum(tl.sum(value * value, axis=1), axis=0) / group_elements
    factor, offset = load_affine(
        weight, weight_stride, bias, bias_stride, scale, scale_stride, shift, shift_stride,
        sample, channel, is_channel,
    )  # fmt: skip
    factor = factor / tl.sqrt(variance + eps)
    value = activate(value * factor[None, :] + offset[None, :], SILU)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    channel_bias: Tensor | None,
    statistics: Tensor | None,
) -> Tensor:
    """Compute `tadsr.kernels.group_norm_silu`, modulated per channel."""
    y, launches = plan_group_norm_silu(
        x, num_groups, weight, bias, eps, scale, shift, silu, channel_bias, statistics
    )
    run_launches(launches, x.device)
    return y


def plan_group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    channel_bias: Tensor | None,
    statistics: Tensor | None,
    *,
    whole_group_elements: int = WHOLE_GROUP_ELEMENTS,
) -> tuple[Tensor, list[Launch]]:
    """Return the output, still empty, and the launches that fill it."""
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.empty_like(x, memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    positions, group_size = height * width, channels // num_groups
    shared: dict[str, Any] = {
        "x": x,
        "y": y,
        **per_channel("channel_bias", channel_bias),
        **per_channel("weight", weight),
        **per_channel("bias", bias),
        **per_channel("scale", scale),
        **per_channel("shift", shift),
        "positions": positions,
        "channels": channels,
        "eps": eps,
        # A constant, so that the compiler knows how a group's first channel is aligned.
        "GROUP_SIZE": group_size,
        "SILU": silu,
    }
    block_channels = next_power_of_2(group_size)
    # Of one size for all images: lanes without a position cost less than another variant.
    rows = min(whole_group_elements // block_channels, WHOLE_GROUP_ROWS)
    if statistics is None and positions <= rows:
        blocks = {"BLOCK_ROWS": rows, "BLOCK_CHANNELS": block_channels}
        elements = float(positions * group_size)
        num_warps = min(16, max(1, rows * block_channels // 1024))
        arguments = shared | blocks | {"group_elements": elements}
        return y, [Launch(whole_group_kernel, (num_groups, batch), arguments, num_warps)]
    launches = []
    if statistics is None:
        statistics, launches = plan_statistics(x, num_groups, channel_bias)
    rows, block_channels = choose_tile(channels, APPLIED_ELEMENTS)
    channel_blocks = ceil_divide(channels, block_channels)
    grid = (ceil_divide(positions, rows * APPLIED_BLOCKS) * channel_blocks, batch)
    arguments = shared | {
        "statistics": statistics.float().contiguous(),
        "num_groups": num_groups,
        "num_channel_blocks": channel_blocks,
        "BLOCK_ROWS": rows,
        "BLOCK_CHANNELS": block_channels,
        "NUM_BLOCKS": APPLIED_BLOCKS,
    }
    return y, [*launches, Launch(apply_kernel, grid, arguments)]
