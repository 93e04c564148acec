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

MEASURED_ELEMENTS = 4096
"""Elements of a block: 16 for each thread of 8 warps."""
PROGRAMS_PER_PROCESSOR = 4
MERGED_ELEMENTS = 2048
"""Elements of a block of chunks."""
MAX_MERGED_ON_USE = 4096
"""Chunks times channels of a block that are merged by whoever reads them: more would be read anew
by too many programs."""
MAX_POSITIONS_ON_USE = 128 * 128
"""Positions of such activations: those of larger ones merge in a launch of its own."""

SIZES = (
    *("positions", "num_groups", "num_chunks", "chunk_positions", "num_channel_blocks"),
    *("num_blocks", "rows", "width", "height", "chunk_rows", "distance_px"),
    *(f"{name}_stride" for name in ("weight", "bias", "channel_bias")),
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


def run_plan(plan: tuple[Any, ...], device: torch.device) -> Any:
    """Run planned launches; return what they fill, the only tensor or a tuple of them."""
    *results, launches = plan
    run_launches(launches, device)
    return results[0] if len(results) == 1 else tuple(results)


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


def choose_chunks(x: Tensor) -> tuple[int, bool]:
    """Choose in how many chunks of positions activations (B, C, H, W) are measured.

    Returns:
        The chunks, of ⌈H·W / chunks⌉ positions, and whether they are merged by who reads them.
    """
    batch, channels, height, width = x.shape
    positions, processors = height * width, count_processors(x.device)
    rows, block_channels = choose_tile(channels, MEASURED_ELEMENTS)
    channel_blocks = ceil_divide(channels, block_channels)
    wanted = ceil_divide(PROGRAMS_PER_PROCESSOR * processors, channel_blocks * batch)
    chunks = min(wanted, ceil_divide(positions, rows))
    most = MAX_MERGED_ON_USE // block_channels
    # Fewer chunks must still occupy the chip.
    is_enough = chunks <= most or 2 * most * channel_blocks * batch >= processors
    on_use = positions <= MAX_POSITIONS_ON_USE and is_enough
    if on_use:
        chunks = min(chunks, most)
    return ceil_divide(positions, ceil_divide(positions, chunks)), on_use


def per_channel(name: str, values: Tensor | None) -> dict[str, Any]:
    """Return a kernel's arguments for values per channel: pointer and distance of samples."""
    if values is None:
        return {name: None, f"{name}_stride": 0}
    rows = values.reshape(-1, values.shape[-1]).contiguous()
    return {name: rows, f"{name}_stride": rows.shape[1] if rows.shape[0] > 1 else 0}
