"""The one step: an image through encoder, UNet and decoder, as a whole or in bands of rows.

`step` takes the step and does a network that overflows again in a wider type. Whole images go
through `whole`, `stages` (fused, plain or compiled networks) and `fused_layers`; bands through
`banded` and `banded_layers`, whose activations lie in `storage`. `plan` says what is done on which
device, `fold` turns timesteps and prompts into small tensors, `graphs` records launches.
"""

from tadsr.lazily import lazy_names

_ORIGINS = {
    "tadsr.onestep.tasks": "batch_pixels group_timesteps read_generators same_size_ranges",
    "tadsr.onestep.plan": "EngineName EnginePlan choose_plan",
    "tadsr.onestep.step": "OneStepEngine",
    "tadsr.tile_spec": "TileSpec",
}

__all__ = sorted(" ".join(_ORIGINS.values()).split())

# Most of this room needs the networks' libraries.
__getattr__ = lazy_names(__name__, _ORIGINS)
