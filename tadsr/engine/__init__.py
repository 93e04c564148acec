"""The fused one-step forward: the pipeline's own weights, the same result, faster.

One image passes through these files in order: `one_step` (encode, one step, decode, and what
happens on overflow), `stages` (the three networks: fused, plain or compiled), `autoencoder` and
`unet` (layer by layer), `layers` (each layer with what surrounds it). Beside them stand
`conditions` (timestep and prompt as small tensors), `upsampling` (two layers as one),
`normalization` (for a CPU), `graphs` (recorded launches), `batches` (images that go together),
`plan` (what is done on which device), `lock` (one
thread at a time), `support` and `watch` (which modules, and whether they are
still the same).
"""

from tadsr.engine.batches import (
    batch_pixels,
    group_timesteps,
    read_generators,
    same_size_ranges,
)
from tadsr.engine.lock import NetworkLock
from tadsr.engine.one_step import OneStepEngine
from tadsr.engine.plan import EngineName, EnginePlan, choose_plan

__all__ = [
    "EngineName",
    "EnginePlan",
    "NetworkLock",
    "OneStepEngine",
    "batch_pixels",
    "choose_plan",
    "group_timesteps",
    "read_generators",
    "same_size_ranges",
]
