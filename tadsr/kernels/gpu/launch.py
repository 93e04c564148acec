"""Launches as data: planned from shapes alone, then run, or only compiled by the tests."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ASSUMED_PROCESSORS = 108
"""Multiprocessors of a GPU that is not there: launches can be planned without one."""
MAX_BLOCK_CHANNELS = 128
"""Channels that a block covers at most: 256 bytes of half precision, whole lines of memory."""

SIZES = (
    *("positions", "num_groups", "num_chunks", "chunk_positions", "num_channel_blocks"),
    *("num_blocks", "rows", "width", "height", "chunk_rows", "distance_px"),
    *(f"{name}_stride" for name in ("weight", "bias", "scale", "shift", "channel_bias")),
    *(f"{name}stride_{side}" for name in ("", "reference_") for side in "bchw"),
)
"""Arguments that Triton must not compile a variant of a kernel for: they follow the image's size,
the batch, or whether a timestep is shared, and all but the channels gain nothing by it."""


@dataclass(frozen=True, eq=False)
class Launch:
    """One kernel launch.

    Args:
        kernel: A `triton.jit` function.
        grid: Number of programs along each axis.
        arguments: All of the kernel's arguments by name.
        num_warps: Warps per program.
        fuses_multiply_add: Whether a·b + c may be rounded once; False keeps torch's rounding.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    num_warps: int = 4
    fuses_multiply_add: bool = True


def run_launches(launches: Sequence[Launch], device: torch.device) -> None:
    """Run launches in order on the device of their tensors."""
    # A launch goes to the current device, whatever device its tensors are on.
    with torch.cuda.device(device if device.type == "cuda" else -1):
        for launch in launches:
            launch.kernel[launch.grid](
                **launch.arguments,
                num_warps=launch.num_warps,
                enable_fp_fusion=launch.fuses_multiply_add,
            )


def count_processors(device: torch.device) -> int:
    """Return the number of multiprocessors of a device."""
    return _count_processors(device.index) if device.type == "cuda" else ASSUMED_PROCESSORS


@functools.cache
def _count_processors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def ceil_divide(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


def choose_tile(channels: int, elements: int) -> tuple[int, int]:
    """Choose the rows and channels of a block of about so many elements."""
    even = channels & -channels  # the largest power of two that divides the channels
    if even < 32:
        even = next_power_of_2(channels)
    block_channels = min(even, MAX_BLOCK_CHANNELS)
    return max(1, elements // block_channels), block_channels


def per_channel(name: str, values: Tensor | None) -> dict[str, Any]:
    """Return a kernel's arguments for values per channel: pointer and distance of samples."""
    if values is None:
        return {name: None, f"{name}_stride": 0}
    rows = values.reshape(-1, values.shape[-1]).contiguous()
    return {name: rows, f"{name}_stride": rows.shape[1] if rows.shape[0] > 1 else 0}
