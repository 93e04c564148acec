"""Mean and variance of groups of channels: chunks of positions, merged after Chan.

Every lane of a block follows Welford's recurrence over its own positions, so nothing is lost where
the mean is much larger than the spread; lanes, chunks and channels are then merged exactly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tadsr.kernels.gpu.launch import (
    MEASURED_ELEMENTS,
    MERGED_ELEMENTS,
    SIZES,
    Launch,
    ceil_divide,
    choose_chunks,
    choose_tile,
    next_power_of_2,
    per_channel,
)


@triton.jit
def welford(value, inside, mean, deviation, count):
    """Take one more value into each lane's mean and squared deviation; `inside` is per row."""
    count += inside.to(tl.float32)
    difference = tl.where(inside[:, None], value - mean, 0.0)
    mean += difference * (1.0 / tl.maximum(count, 1.0))[:, None]
    deviation += difference * (value - mean)
    return mean, deviation, count


@triton.jit
def store_chunk(mean, deviation, count, means, deviations, at, mask):
    """Merge the lanes of each column and store the chunk's mean and squared deviation."""
    weight = count[:, None]
    chunk_mean = tl.sum(mean * weight, axis=0) / tl.sum(count, axis=0)
    between = mean - chunk_mean[None, :]
    chunk_deviation = tl.sum(deviation + weight * between * between, axis=0)
    tl.store(means + at, chunk_mean, mask=mask)
    tl.store(deviations + at, chunk_deviation, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def measure_kernel(
    x,
    residual,
    total,
    channel_bias,
    channel_bias_stride,
    means,
    deviations,
    positions,
    channels,
    chunk_positions,
    num_chunks,
    num_channel_blocks,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Measure each channel of a chunk of x, or of x + channel_bias + residual, which is stored."""
    chunk = tl.program_id(0) // num_channel_blocks
    block = tl.program_id(0) % num_channel_blocks
    sample = tl.program_id(1).to(tl.int64)
    channel = block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    is_channel = channel < channels
    lane = tl.arange(0, BLOCK_ROWS)
    start = sample * positions * channels
    if channel_bias is not None:
        bias_at = channel_bias + sample * channel_bias_stride + channel
        bias = tl.load(bias_at, mask=is_channel, other=0.0).to(tl.float32)[None, :]

    mean = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], tl.float32)
    deviation = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], tl.float32)
    count = tl.zeros([BLOCK_ROWS], tl.float32)
    first = chunk * chunk_positions
    stop = tl.minimum(first + chunk_positions, positions)
    for row_start in range(first, stop, BLOCK_ROWS):
        row = row_start + lane
        inside = row < stop
        mask = inside[:, None] & is_channel[None, :]
        offset = start + row.to(tl.int64)[:, None] * channels + channel[None, :]
        value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
        if residual is not None:
            if channel_bias is not None:
                value += bias
            value += tl.load(residual + offset, mask=mask, other=0.0).to(tl.float32)
            rounded = value.to(total.dtype.element_ty)
            tl.store(total + offset, rounded, mask=mask)
            value = rounded.to(tl.float32)  # what the GroupNorm will read
        mean, deviation, count = welford(value, inside, mean, deviation, count)
    at = (sample * num_chunks + chunk) * channels + channel
    store_chunk(mean, deviation, count, means, deviations, at, is_channel)


@triton.jit
def merge_for_channels(
    means,
    deviations,
    channel_bias,
    channel_bias_stride,
    positions,
    channels,
    chunk_positions,
    num_chunks,
    group_elements,
    sample,
    channel,
    first_group,
    GROUP_SIZE: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    """Merge chunks to mean and variance of the group of each of a block's channels."""
    index = tl.arange(0, BLOCK_GROUPS)
    lane = tl.arange(0, PADDED_GROUP)
    member = (first_group + index)[:, None] * GROUP_SIZE + lane[None, :]
    is_member = (lane < GROUP_SIZE)[None, :] & (member < channels)
    bias = tl.zeros([BLOCK_GROUPS, PADDED_GROUP], tl.float32)
    if channel_bias is not None:
        bias_at = channel_bias + (sample * channel_bias_stride + member)
        bias = tl.load(bias_at, mask=is_member, other=0.0).to(tl.float32)
    # Sums about the first chunk's mean lose nothing where the mean is much larger than the spread.
    start = sample * num_chunks * channels
    center = tl.load(means + (start + member), mask=is_member, other=0.0) + bias
    center = tl.sum(center, axis=1) / GROUP_SIZE
    first = tl.zeros([BLOCK_CHUNKS, BLOCK_GROUPS, PADDED_GROUP], tl.float32)
    second = tl.zeros([BLOCK_CHUNKS, BLOCK_GROUPS, PADDED_GROUP], tl.float32)
    for chunk_start in range(0, num_chunks, BLOCK_CHUNKS):
        chunk = chunk_start + tl.arange(0, BLOCK_CHUNKS)
        mask = (chunk < num_chunks)[:, None, None] & is_member[None, :, :]
        count = tl.minimum(chunk_positions, positions - chunk * chunk_positions).to(tl.float32)
        count = count[:, None, None]
        at = start + chunk[:, None, None] * channels + member[None, :, :]
        mean = tl.load(means + at, mask=mask, other=0.0) + (bias - center[:, None])[None, :, :]
        within = tl.load(deviations + at, mask=mask, other=0.0)
        first += tl.where(mask, count * mean, 0.0)
        second += tl.where(mask, within + count * mean * mean, 0.0)
    offset = tl.sum(tl.sum(first, axis=2), axis=0) / group_elements
    square = tl.sum(tl.sum(second, axis=2), axis=0) / group_elements
    variances = tl.maximum(square - offset * offset, 0.0)
    is_own = (channel // GROUP_SIZE - first_group)[None, :] == index[:, None]
    mean = tl.sum(tl.where(is_own, (center + offset)[:, None], 0.0), axis=0)
    return mean, tl.sum(tl.where(is_own, variances[:, None], 0.0), axis=0)


@triton.jit(do_not_specialize=SIZES)
def merge_kernel(
    means,
    deviations,
    channel_bias,
    channel_bias_stride,
    statistics,
    positions,
    channels,
    chunk_positions,
    num_chunks,
    group_elements,
    GROUP_SIZE: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    """Merge chunks and channels to one group's mean and biased variance."""
    group = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    one = tl.arange(0, 1)
    mean, variance = merge_for_channels(
        means, deviations, channel_bias, channel_bias_stride, positions, channels,
        chunk_positions, num_chunks, group_elements, sample, group * GROUP_SIZE + one, group,
        GROUP_SIZE, PADDED_GROUP, 1, BLOCK_CHUNKS,
    )  # fmt: skip
    result = statistics + (sample * tl.num_programs(0) + group) * 2 + one
    tl.store(result, mean)
    tl.store(result + 1, variance)


def plan_moments(
    x: Tensor,
    num_chunks: int,
    channel_bias: Tensor | None = None,
    residual: Tensor | None = None,
    total: Tensor | None = None,
) -> tuple[Tensor, Launch]:
    """Plan the moments of x, or of x + channel_bias + residual where one is given.

    Args:
        x: Activations (B, C, H, W) in NHWC memory.
        num_chunks: Chunks of positions, as `choose_chunks` returns them.
        channel_bias: (C,), (1, C), (B, C) or None; only beside a residual.
        residual: Like `x`, or None.
        total: Receives the sum with the residual.

    Returns:
        Mean and sum of squared deviations, (2, B, num_chunks, C), float32, and the launch that
        fills them.
    """
    batch, channels, height, width = x.shape
    positions = height * width
    rows, block_channels = choose_tile(channels, MEASURED_ELEMENTS)
    channel_blocks = ceil_divide(channels, block_channels)
    moments = x.new_empty((2, batch, num_chunks, channels), dtype=torch.float32)
    return moments, Launch(
        measure_kernel,
        (num_chunks * channel_blocks, batch),
        {
            "x": x,
            "residual": residual,
            "total": total,
            **per_channel("channel_bias", channel_bias),
            "means": moments[0],
            "deviations": moments[1],
            "positions": positions,
            "channels": channels,
            "chunk_positions": ceil_divide(positions, num_chunks),
            "num_chunks": num_chunks,
            "num_channel_blocks": channel_blocks,
            "BLOCK_ROWS": rows,
            "BLOCK_CHANNELS": block_channels,
        },
        num_warps=8,
    )


def plan_row_moments(x: Tensor) -> tuple[Tensor, list[Launch]]:
    """Plan the moments of each row, (2, B, H, C)."""
    moments, launch = plan_moments(x.contiguous(memory_format=torch.channels_last), x.shape[2])
    return moments, [launch]


def plan_merge(
    moments: Tensor,
    num_groups: int,
    positions: int,
    chunk_positions: int | None = None,
    channel_bias: Tensor | None = None,
) -> tuple[Tensor, Launch]:
    """Plan the merging of moments, (2, B, chunks, C), to mean and variance, (B, num_groups, 2)."""
    means, deviations = moments
    _, batch, chunks, channels = moments.shape
    group_size = channels // num_groups
    padded = next_power_of_2(group_size)
    statistics = means.new_empty((batch, num_groups, 2))
    return statistics, Launch(
        merge_kernel,
        (num_groups, batch),
        {
            "means": means,
            "deviations": deviations,
            **per_channel("channel_bias", channel_bias),
            "statistics": statistics,
            "positions": positions,
            "channels": channels,
            "chunk_positions": chunk_positions or ceil_divide(positions, chunks),
            "num_chunks": chunks,
            "group_elements": float(positions * group_size),
            "GROUP_SIZE": group_size,
            "PADDED_GROUP": padded,
            "BLOCK_CHUNKS": max(1, MERGED_ELEMENTS // padded),
        },
    )


def plan_add_with_statistics(
    x: Tensor, residual: Tensor, channel_bias: Tensor | None, num_groups: int, num_chunks: int
) -> tuple[Tensor, Tensor, list[Launch]]:
    """Return sum and statistics, still empty, and the launches that fill them."""
    x = x.contiguous(memory_format=torch.channels_last)
    residual = residual.contiguous(memory_format=torch.channels_last)
    total = torch.empty_like(x, memory_format=torch.channels_last)
    chunks = num_chunks or choose_chunks(x)[0]
    moments, measure = plan_moments(x, chunks, channel_bias, residual, total)
    if num_chunks:
        return total, moments, [measure]
    statistics, merge = plan_merge(moments, num_groups, x.shape[2] * x.shape[3])
    return total, statistics, [measure, merge]
