"""Timesteps as users give them: numbers, and maps that differ from place to place."""

from tadsr.conditioning.field import TimestepField, read_conditions, read_timesteps, run_at
from tadsr.conditioning.timestep_map import TimestepLike, TimestepMap, largest_timestep
