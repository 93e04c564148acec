"""GroupNorm and SiLU: one program per group if small, else split over positions."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tadsr.kernels.gpu.launch import (
    MERGED_ELEMENTS,
    SIZES,
    Launch,
    ceil_divide,
    choose_chunks,
    choose_tile,
    next_power_of_2,
    per_channel,
)
from tadsr.kernels.gpu.statistics import merge_for_channels, plan_merge, plan_moments

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
    means,
    deviations,
    channel_bias,
    channel_bias_stride,
    weight,
    weight_stride,
    bias,
    bias_stride,
    positions,
    channels,
    num_groups,
    chunk_positions,
    num_chunks,
    group_elements,
    eps,
    num_channel_blocks,
    GROUP_SIZE: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    """Normalize by known statistics, or by the moments of chunks, which are merged first."""
    first = (tl.program_id(0) // num_channel_blocks) * (BLOCK_ROWS * NUM_BLOCKS)
    block = tl.program_id(0) % num_channel_blocks
    sample = tl.program_id(1).to(tl.int64)
    channel = block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    is_channel = channel < channels
    if statistics is not None:
        at = statistics + (sample * num_groups + channel // GROUP_SIZE) * 2
        mean = tl.load(at, mask=is_channel, other=0.0)
        variance = tl.load(at + 1, mask=is_channel, other=1.0)
    else:
        mean, variance = merge_for_channels(
            means, deviations, channel_bias, channel_bias_stride, positions, channels,
            chunk_positions, num_chunks, group_elements, sample, channel,
            block * BLOCK_CHANNELS // GROUP_SIZE,
            GROUP_SIZE, PADDED_GROUP, BLOCK_GROUPS, BLOCK_CHUNKS,
        )  # fmt: skip
    factor = load_channels(weight, weight_stride, sample, channel, is_channel, 1.0)
    offset = load_channels(bias, bias_stride, sample, channel, is_channel, 0.0)
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
    factor = load_channels(weight, weight_stride, sample, channel, is_channel, 1.0)
    offset = load_channels(bias, bias_stride, sample, channel, is_channel, 0.0)
    factor = factor / tl.sqrt(variance + eps)
    value = activate(value * factor[None, :] + offset[None, :], SILU)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)


def plan_group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
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
    launches, moments, chunks = [], None, 1
    if statistics is None:
        chunks, on_use = choose_chunks(x)
        statistics, measure = plan_moments(x, chunks)
        launches.append(measure)
        if not on_use:
            statistics, merge = plan_merge(
                statistics, num_groups, positions, channel_bias=channel_bias
            )
            launches.append(merge)
    rows, block_channels = choose_tile(channels, APPLIED_ELEMENTS)
    merging = {"PADDED_GROUP": 1, "BLOCK_GROUPS": 1, "BLOCK_CHUNKS": 1}
    if statistics.ndim == 4:
        moments, statistics, chunks = statistics, None, statistics.shape[2]
        merging = _plan_merging(group_size, block_channels)
    channel_blocks = ceil_divide(channels, block_channels)
    grid = (ceil_divide(positions, rows * APPLIED_BLOCKS) * channel_blocks, batch)
    arguments = shared | {
        "statistics": None if statistics is None else statistics.float().contiguous(),
        "means": None if moments is None else moments[0],
        "deviations": None if moments is None else moments[1],
        "num_groups": num_groups,
        "chunk_positions": ceil_divide(positions, chunks),
        "num_chunks": chunks,
        "group_elements": float(positions * group_size),
        "num_channel_blocks": channel_blocks,
        "BLOCK_ROWS": rows,
        "BLOCK_CHANNELS": block_channels,
        "NUM_BLOCKS": APPLIED_BLOCKS,
        **merging,
    }
    return y, [*launches, Launch(apply_kernel, grid, arguments)]


def _plan_merging(group_size: int, block_channels: int) -> dict[str, int]:
    """Return the sides of a block of chunks, of the groups that a block of channels touches."""
    padded = next_power_of_2(group_size)
    if block_channels % group_size == 0:
        groups = block_channels // group_size
    else:
        groups = next_power_of_2((block_channels - 2) // group_size + 2)
    chunks = max(1, MERGED_ELEMENTS // (padded * groups))
    return {"PADDED_GROUP": padded, "BLOCK_GROUPS": groups, "BLOCK_CHUNKS": chunks}
