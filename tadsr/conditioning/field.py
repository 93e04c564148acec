"""The maps of a batch of images, and how their timesteps come together in one result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tadsr.conditioning.timestep_map import TimestepLike, TimestepMap, largest_timestep

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class TimestepField:
    """The maps of a batch of images, in place of timesteps (B,).

    The networks run once for every knot of the maps, each time on the whole image with one
    timestep, and every pixel mixes the results by its own timestep. Giving each position's timestep
    to one single run does not work: GroupNorm sees the whole image, and the UNet's activations are
    of another size at each timestep, so that all places would be normalised wrongly (on tadsr-tiny
    a half at timestep 1 beside one at 900 loses its colours).
    """

    maps: tuple[TimestepMap, ...]
    """One per image."""

    def __getitem__(self, images: slice) -> TimestepField:
        """Return the field of some of the images."""
        return TimestepField(self.maps[images])

    @property
    def knots(self) -> list[tuple[int, ...]]:
        """Timesteps of every run, one per image."""
        # Images with fewer knots repeat their last, with no weight.
        count = max(len(m.knots) for m in self.maps)
        knots = [[*m.knots, *[m.knots[-1]] * (count - len(m.knots))] for m in self.maps]
        return list(zip(*knots, strict=True))

    def mix(
        self, results: Sequence[Tensor], size: tuple[int, int], rows: tuple[int, int] | None = None
    ) -> Tensor:
        """Mix the runs' results, weighted at each position by its timestep.

        Args:
            results: Images or parts of them, (B, C, rows, W), one per knot.
            rows: First row that `results` are of, and the one after the last; None for all.
        """
        if len(results) == 1:
            return results[0]
        rows = rows or (0, size[0])
        weights = torch.zeros(len(self.maps), len(results), rows[1] - rows[0], size[1])
        for image, timestep_map in enumerate(self.maps):
            own = timestep_map.weights(*size, rows)
            weights[image, : len(own)] = own
        weights = weights.to(results[0].device)
        mixed = torch.zeros_like(results[0], dtype=torch.float32)
        for number, result in enumerate(results):
            mixed.addcmul_(result.float(), weights[:, number, None])
        return mixed.to(results[0].dtype)


def run_at(
    timesteps: Sequence[int] | TimestepField,
    run: Callable[[Sequence[int]], Result],
    generator: torch.Generator | None = None,
) -> list[Result]:
    """Run at one timestep per image, or at every knot of maps with the same noise."""
    if not isinstance(timesteps, TimestepField):
        return [run(timesteps)]
    state = None if generator is None else generator.get_state()
    results = []
    for knot in timesteps.knots:
        if generator is not None:
            generator.set_state(state)
        results.append(run(knot))
    return results


def read_conditions(
    timestep: Any, sizes: Sequence[tuple[int, int]], last_timestep: int
) -> list[int] | TimestepField:
    """Turn what a user gives into one timestep per image, or into one per position."""
    entries = read_timestep_maps(timestep, sizes, last_timestep)
    if entries is None:
        return read_timesteps(timestep, len(sizes), last_timestep)
    maps = (
        entry
        if isinstance(entry, TimestepMap)
        else TimestepMap.constant(*read_timesteps(entry, 1, last_timestep))
        for entry in entries
    )
    return TimestepField(tuple(maps))


def read_timesteps(
    timestep: int | Sequence[int] | Tensor, num_images: int, last_timestep: int
) -> list[int]:
    """Turn what a user gives into one timestep per image."""
    if isinstance(timestep, Tensor):
        timestep = timestep.tolist()
    values = (
        list(timestep)
        if hasattr(timestep, "__len__") and not isinstance(timestep, str)
        else [timestep] * num_images
    )
    if len(values) != num_images:
        raise ValueError(
            f"timestep must be one number or one per image ({num_images}), got {len(values)}"
        )
    whole = [_whole_number(value) for value in values]
    for value in whole:
        if not 0 <= value <= last_timestep:
            raise ValueError(
                f"timestep must be in 0..{last_timestep}, got {value}; small keeps the photo "
                "faithful, large makes it vivid"
            )
    return whole


def _whole_number(value: Any) -> int:
    """Return a whole number as an int; a float such as 500.0 counts as whole."""
    if isinstance(value, bool) or not isinstance(value, Real):
        hint = "; texts come as prompt=" if isinstance(value, str) else ""
        raise TypeError(f"timestep must be a whole number, got {type(value).__name__}{hint}")
    if value != value or value % 1 != 0:
        raise ValueError(f"timestep must be a whole number, got {value}")
    return int(value)


def read_timestep_maps(
    timestep: TimestepLike | Sequence[TimestepLike],
    sizes: Sequence[tuple[int, int]],
    last_timestep: int,
) -> list[TimestepMap | Any] | None:
    """Find maps where a user gives timesteps."""
    if _is_map(timestep):
        entries = [timestep] * len(sizes)
    elif isinstance(timestep, list | tuple) and any(map(_is_map, timestep)):
        entries = list(timestep)
    else:
        return None
    if len(entries) != len(sizes):
        raise ValueError(
            f"timestep must be one map, or a map or number per image ({len(sizes)}), got "
            f"{len(entries)}"
        )
    read = [
        _read_map(entry, size) if _is_map(entry) else entry
        for entry, size in zip(entries, sizes, strict=True)
    ]
    for entry in read:
        if isinstance(entry, TimestepMap) and largest_timestep(entry) > last_timestep:
            raise ValueError(
                f"a timestep map must be in 0..{last_timestep}, got one of up to "
                f"{largest_timestep(entry):g}"
            )
    return read


def _is_map(value: Any) -> bool:
    is_grid = isinstance(value, np.ndarray | Tensor) and value.ndim > 1
    return is_grid or isinstance(value, TimestepMap | Image.Image | Mapping)


def _read_map(value: Any, size: tuple[int, int]) -> TimestepMap:
    if isinstance(value, TimestepMap):
        return value
    if isinstance(value, Mapping):
        return TimestepMap.from_regions(value, size)
    return TimestepMap.from_image(value)
