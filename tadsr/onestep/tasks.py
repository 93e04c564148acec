"""Tasks of the one step: what it is taken on and at, what goes through together, in what memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from torch import Tensor

from tadsr.conditioning import TimestepField
from tadsr.config import UpscaleSettings
from tadsr.progress import Progress
from tadsr.prompts import Prompts

if TYPE_CHECKING:
    from tadsr.networks.time_aware_vae import TimeAwareAutoencoderKL


_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(device: torch.device) -> int:
    """Return the bytes that can still be taken on a device.

    On the CPU this is what the system has to give without swapping, or what a container's limit
    leaves.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch holds in reserve can be used again.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = psutil.virtual_memory().available
    limit = _cgroup_value("memory.max")
    if limit is not None:
        found = min(found, max(0, limit - (_cgroup_value("memory.current") or 0)))
    return found


def used_bytes(device: torch.device) -> int:
    """Return the bytes that this process holds on a device."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    message = str(error).lower()
    # Of torch on a CPU, of CUDA for pinned memory, and of its libraries.
    names = "out of memory", "alloc_failed"
    is_named = any(name in message for name in names)
    return isinstance(error, RuntimeError) and (
        is_named or ("alloc" in message and "memory" in message)
    )


def _cgroup_value(name: str) -> int | None:
    try:
        return int((_CGROUP / name).read_text())
    except (OSError, ValueError):  # no container, or "max"
        return None


@dataclass(frozen=True, eq=False)
class Task:
    """Images of one size, and what the step on them is taken at."""

    timesteps: Sequence[int] | TimestepField
    """One per image, or a map per image."""
    prompts: Prompts
    """One per image."""
    device: torch.device
    """Where the networks run."""
    settings: UpscaleSettings
    generator: torch.Generator | None = None
    """Samples the posterior; None takes its mean."""
    rgb: Tensor | None = None
    """(B, 3, h, w), in [0, 1], or one image for all timesteps; None until it is their turn. A
    fourth channel is alpha, by which adain weighs pixels."""
    progress: Progress | None = None
    takes_bytes: bool = False
    """Whether the result may be bytes."""

    def __getitem__(self, images: slice) -> Task:
        """Return the task for some of the images."""
        rgb = self.rgb[images] if len(self.rgb) > 1 else self.rgb
        return replace(
            self, rgb=rgb, timesteps=self.timesteps[images], prompts=self.prompts[images]
        )

    @property
    def network_size(self) -> tuple[int, int]:
        """Height and width that the networks work at, before padding."""
        return self.settings.network_size(*self.rgb.shape[-2:])

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of the results."""
        return self.settings.output_size(*self.rgb.shape[-2:])

    @property
    def can_be_cut(self) -> bool:
        """Whether it can be computed in pieces; what is enlarged for the networks is small."""
        return self.network_size == self.output_size

    @property
    def batch(self) -> int:
        """Number of images."""
        return len(self.prompts.embeds)

    @property
    def num_runs(self) -> int:
        """How often the networks run: once, or once for every knot of maps."""
        return len(self.timesteps.knots) if isinstance(self.timesteps, TimestepField) else 1

    def mix(
        self, results: Sequence[Tensor], size: tuple[int, int], rows: tuple[int, int] | None = None
    ) -> Tensor:
        """Mix results by maps, as `TimestepField.mix`; without maps return the only one."""
        if isinstance(self.timesteps, TimestepField):
            return self.timesteps.mix(results, size, rows)
        return results[0]


MAX_BATCH_PIXELS = 16 * 512 * 512
"""Output of a batch beyond which a large GPU gains nothing more."""
TOGETHER_PIXELS = 2**20
"""One image's timesteps go through an accelerator together up to this area of all results."""
_SHARE_OF_AVAILABLE = 0.5
_WIDEST_COPIES = 4
"""Activations of the decoder's widest layer that are alive together."""


def batch_pixels(vae: TimeAwareAutoencoderKL, device: torch.device) -> int:
    """Return the output of a batch in px that a device takes; 0 where batches gain nothing."""
    if device.type != "cuda":
        return 0
    widest = max(vae.config.block_out_channels[:2])
    bytes_per_pixel = _WIDEST_COPIES * widest * vae.dtype.itemsize
    room = int(_SHARE_OF_AVAILABLE * available_bytes(device))
    return min(MAX_BATCH_PIXELS, room // bytes_per_pixel)


def same_size_ranges(
    sizes: Sequence[tuple[int, int]], max_images: Callable[[tuple[int, int]], int]
) -> list[range]:
    """Group neighbours of one size.

    Returns:
        Ranges that together are all images in order, nearly equal in length where one run of equal
        sizes makes several.
    """
    ranges: list[range] = []
    start = 0
    for stop in range(1, len(sizes) + 1):
        if stop < len(sizes) and sizes[stop] == sizes[start]:
            continue
        count = stop - start
        groups = -(-count // max_images(sizes[start]))
        cuts = [start + number * count // groups for number in range(groups + 1)]
        ranges += [range(first, last) for first, last in pairwise(cuts)]
        start = stop
    return ranges


def read_generators(
    generator: torch.Generator | Sequence[torch.Generator] | None, num_images: int
) -> list[torch.Generator | None]:
    """Return the generator of each image.

    Args:
        generator: One for all, which they draw from in turn, or one per image; None for none.
    """
    is_list = isinstance(generator, list | tuple)
    generators = list(generator) if is_list else [generator] * num_images
    for each in generators:
        if not isinstance(each, torch.Generator) and (is_list or each is not None):
            raise TypeError(
                "generator must be a torch.Generator, or one per image, got "
                f"{type(each).__name__}; torch.Generator().manual_seed(seed) makes one"
            )
    if len(generators) != num_images:
        raise ValueError(
            f"generator must be one, or one per image ({num_images}), got {len(generators)}"
        )
    return generators


def group_timesteps(
    timesteps: Sequence[int], size: tuple[int, int], device: torch.device
) -> list[Sequence[int]]:
    """Divide the timesteps of one image into those that go through the networks together."""
    if not timesteps:
        raise ValueError("timesteps must be at least one, got none")
    # A CPU gains nothing by it.
    count = 1 if device.type == "cpu" else max(1, TOGETHER_PIXELS // (size[0] * size[1]))
    return [timesteps[start : start + count] for start in range(0, len(timesteps), count)]


def share_of(progress: Progress | None, number: int, count: int) -> Progress | None:
    """Return the progress of one of several images, as a part of the whole."""
    if progress is None:
        return None
    return lambda share: progress((number + share) / count)
