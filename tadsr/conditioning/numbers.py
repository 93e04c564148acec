"""Timesteps as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

from torch import Tensor


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
        raise TypeError(f"timestep must be a whole number, got {type(value).__name__}")
    if value != value or value % 1 != 0:
        raise ValueError(f"timestep must be a whole number, got {value}")
    return int(value)
