"""Images in [-1, 1] of any layout to bytes, and the colour fixes that end in bytes."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tadsr.color import VARIANCE_FLOOR
from tadsr.kernels.gpu.launch import (
    PROGRAMS_PER_PROCESSOR,
    SIZES,
    Launch,
    ceil_divide,
    count_processors,
    next_power_of_2,
)
from tadsr.kernels.gpu.statistics import plan_merge, store_chunk, welford
from tadsr.kernels.images import empty_bytes

VALUES_AT_ONCE = 512
"""Values of one row of pixels that a program converts at a time."""


@triton.jit
def to_unit(value):
    """Bring values from [-1, 1] to [0, 1], clamped, float32."""
    return tl.minimum(tl.maximum(value.to(tl.float32), -1.0), 1.0) * 0.5 + 0.5


@triton.jit
def to_byte(value):
    """Turn [0, 1] into 0..255, rounded half up."""
    value = tl.minimum(tl.maximum(value, 0.0), 1.0)
    return tl.floor(value * 255.0 + 0.5).to(tl.uint8)


@triton.jit
def row_offsets(position, stride_c, stride_w, CHANNELS: tl.constexpr, PACKED: tl.constexpr):
    """Return where in its row each value of a result's row comes from."""
    offset = position.to(tl.int64)
    if not PACKED:
        x, channel = (position // CHANNELS).to(tl.int64), (position % CHANNELS).to(tl.int64)
        offset = x * stride_w + channel * stride_c
    return offset


@triton.jit(do_not_specialize=SIZES)
def to_uint8_kernel(
    image,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    result,
    height,
    width,
    num_blocks,
    CHANNELS: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Convert a part of a row of pixels."""
    y = (tl.program_id(0) // num_blocks).to(tl.int64)
    position = (tl.program_id(0) % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    sample = tl.program_id(1).to(tl.int64)
    mask = position < width * CHANNELS
    row = image + sample * stride_b + y * stride_h
    at = row + row_offsets(position, stride_c, stride_w, CHANNELS, PACKED)
    value = to_byte(to_unit(tl.load(at, mask=mask, other=0.0)))
    start = (sample * height + y) * (width * CHANNELS)
    tl.store(result + start + position, value, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def color_moments_kernel(
    image,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    means,
    deviations,
    height,
    width,
    chunk_rows,
    num_chunks,
    FIRST_COLUMN: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Measure the channels of a chunk of rows, into columns of a table of 2·CHANNELS."""
    chunk = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, PADDED_CHANNELS).to(tl.int64)
    is_channel = channel < CHANNELS
    mean = tl.zeros([BLOCK, PADDED_CHANNELS], tl.float32)
    deviation = tl.zeros([BLOCK, PADDED_CHANNELS], tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    first = chunk * chunk_rows
    stop = tl.minimum(first + chunk_rows, height)
    for y in range(first, stop):
        row = image + sample * stride_b + tl.cast(y, tl.int64) * stride_h
        for start in range(0, width, BLOCK):
            x = start + tl.arange(0, BLOCK)
            inside = x < width
            at = row + x.to(tl.int64)[:, None] * stride_w + channel[None, :] * stride_c
            mask = inside[:, None] & is_channel[None, :]
            value = to_unit(tl.load(at, mask=mask, other=0.0))
            mean, deviation, count = welford(value, inside, mean, deviation, count)
    column = (sample * num_chunks + chunk) * (2 * CHANNELS) + FIRST_COLUMN + channel
    store_chunk(mean, deviation, count, means, deviations, column, is_channel)


@triton.jit(do_not_specialize=SIZES)
def adain_kernel(
    image,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    statistics,
    unbiased,
    floor,
    result,
    height,
    width,
    num_blocks,
    CHANNELS: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Give a part of a row of pixels the wanted moments."""
    y = (tl.program_id(0) // num_blocks).to(tl.int64)
    position = (tl.program_id(0) % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    sample = tl.program_id(1).to(tl.int64)
    mask = position < width * CHANNELS
    channel = position % CHANNELS
    row = image + sample * stride_b + y * stride_h
    at = row + row_offsets(position, stride_c, stride_w, CHANNELS, PACKED)
    value = to_unit(tl.load(at, mask=mask, other=0.0))
    fixed = value
    for c in tl.static_range(CHANNELS):
        moments = statistics + (sample * 2 * CHANNELS + c) * 2
        mean, variance = tl.load(moments), tl.load(moments + 1) * unbiased
        wanted = moments + 2 * CHANNELS
        wanted_mean, wanted_variance = tl.load(wanted), tl.load(wanted + 1) * unbiased
        factor = tl.sqrt(wanted_variance + floor) / tl.sqrt(variance + floor)
        fixed = tl.where(channel == c, (value - mean) * factor + wanted_mean, fixed)
    start = (sample * height + y) * (width * CHANNELS)
    tl.store(result + start + position, to_byte(fixed), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def wavelet_level_kernel(
    image,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    reference,
    reference_stride_b,
    reference_stride_c,
    reference_stride_h,
    reference_stride_w,
    source,
    target,
    result,
    height,
    width,
    num_blocks,
    distance_px,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Blur a part of a row of one channel's difference once.

    The first level has no `source` and takes the difference from the images; the last has no
    `target` and writes the fixed image's bytes.
    """
    y = (tl.program_id(0) // num_blocks).to(tl.int64)
    x = (tl.program_id(0) % num_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sample = (tl.program_id(1) // CHANNELS).to(tl.int64)
    channel = (tl.program_id(1) % CHANNELS).to(tl.int64)
    mask = x < width
    plane = tl.program_id(1).to(tl.int64) * height * width
    image += sample * stride_b + channel * stride_c
    reference += sample * reference_stride_b + channel * reference_stride_c
    blurred = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(3):
        # Clamped positions are the replicated edges.
        tap_y = tl.minimum(tl.maximum(y + (i - 1) * distance_px, 0), height - 1)
        for j in tl.static_range(3):
            tap_x = tl.minimum(tl.maximum(x + (j - 1) * distance_px, 0), width - 1)
            if source is None:
                at = tap_y * reference_stride_h + tap_x * reference_stride_w
                value = to_unit(tl.load(reference + at, mask=mask, other=0.0))
                at = tap_y * stride_h + tap_x * stride_w
                value -= to_unit(tl.load(image + at, mask=mask, other=0.0))
            else:
                value = tl.load(source + plane + tap_y * width + tap_x, mask=mask, other=0.0)
            blurred += (2 - (i - 1) * (i - 1)) * (2 - (j - 1) * (j - 1)) * 0.0625 * value
    if target is not None:
        tl.store(target + plane + y * width + x, blurred, mask=mask)
    else:
        value = to_unit(tl.load(image + y * stride_h + x * stride_w, mask=mask, other=0.0))
        at = ((sample * height + y) * width + x) * CHANNELS + channel
        tl.store(result + at, to_byte(value + blurred), mask=mask)


def plan_to_uint8_nhwc(image: Tensor) -> tuple[Tensor, list[Launch]]:
    """Return the bytes, still empty, and the launch that fills them."""
    batch, channels, height, width = image.shape
    result = empty_bytes(image)
    blocks = _blocks(width * channels)
    arguments = {
        **_strided("image", image),
        "result": result,
        "height": height,
        "width": width,
        **blocks,
        "CHANNELS": channels,
        "PACKED": _is_packed(image),
    }
    grid = (height * blocks["num_blocks"], batch)
    return result, [Launch(to_uint8_kernel, grid, arguments, fuses_multiply_add=False)]


def plan_adain(image: Tensor, reference: Tensor) -> tuple[Tensor, list[Launch]]:
    """Return the bytes, still empty, and the launches that fill them."""
    batch, channels, height, width = image.shape
    result = empty_bytes(image)
    wanted = PROGRAMS_PER_PROCESSOR * count_processors(image.device)
    chunk_rows = ceil_divide(height, max(1, wanted // batch))
    chunks = ceil_divide(height, chunk_rows)
    moments = image.new_empty((2, batch, chunks, 2 * channels), dtype=torch.float32)
    launches = []
    for first_column, x in ((0, image), (channels, reference)):
        arguments = {
            **_strided("image", x),
            "means": moments[0],
            "deviations": moments[1],
            "height": height,
            "width": width,
            "chunk_rows": chunk_rows,
            "num_chunks": chunks,
            "FIRST_COLUMN": first_column,
            "CHANNELS": channels,
            "PADDED_CHANNELS": next_power_of_2(channels),
            "BLOCK": VALUES_AT_ONCE,
        }
        launches.append(Launch(color_moments_kernel, (chunks, batch), arguments))
    positions = height * width
    statistics, merge = plan_merge(moments, 2 * channels, positions, chunk_rows * width)
    blocks = _blocks(width * channels)
    arguments = {
        **_strided("image", image),
        "statistics": statistics,
        # A single pixel has no unbiased variance (0 / 0); its spread is 0.
        "unbiased": positions / max(1, positions - 1),
        "floor": VARIANCE_FLOOR,
        "result": result,
        "height": height,
        "width": width,
        **blocks,
        "CHANNELS": channels,
        "PACKED": _is_packed(image),
    }
    apply = Launch(adain_kernel, (height * blocks["num_blocks"], batch), arguments)
    return result, [*launches, merge, apply]


def plan_wavelet(image: Tensor, reference: Tensor, levels: int) -> tuple[Tensor, list[Launch]]:
    """Return the bytes, still empty, and the launches that fill them, one a level."""
    batch, channels, height, width = image.shape
    result = empty_bytes(image)
    blocks = _blocks(width)
    # Each level reads what the one before has written.
    scratch = image.new_empty((min(2, levels - 1), *image.shape), dtype=torch.float32)
    launches = []
    for level in range(levels):
        arguments = {
            **_strided("image", image),
            **_strided("reference", reference, prefix="reference_"),
            "source": scratch[(level - 1) % 2] if level > 0 else None,
            "target": scratch[level % 2] if level < levels - 1 else None,
            "result": result,
            "height": height,
            "width": width,
            **blocks,
            "distance_px": 2**level,
            "CHANNELS": channels,
        }
        grid = (height * blocks["num_blocks"], batch * channels)
        launches.append(Launch(wavelet_level_kernel, grid, arguments))
    return result, launches


def _is_packed(image: Tensor) -> bool:
    """Return whether rows lie in memory as in the result."""
    return image.stride(1) == 1 and image.stride(3) == image.shape[1]


def _strided(name: str, image: Tensor, prefix: str = "") -> dict[str, Any]:
    strides = zip("bchw", image.stride(), strict=True)
    return {name: image} | {f"{prefix}stride_{side}": stride for side, stride in strides}


def _blocks(length: int) -> dict[str, int]:
    return {"num_blocks": ceil_divide(length, VALUES_AT_ONCE), "BLOCK": VALUES_AT_ONCE}
