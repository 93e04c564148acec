"""Timesteps that differ from place to place in an image."""

from tadsr.conditioning.field import TimestepField, run_at
from tadsr.conditioning.timestep_map import (
    TimestepLike,
    TimestepMap,
    largest_timestep,
    read_timestep_maps,
)

__all__ = [
    "TimestepField",
    "TimestepLike",
    "TimestepMap",
    "largest_timestep",
    "read_timestep_maps",
    "run_at",
]
