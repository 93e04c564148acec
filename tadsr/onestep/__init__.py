"""The one step: an image through encoder, UNet and decoder, as a whole or in bands of rows.

`step` takes the step and does a network that overflows again in a wider type. Whole images go
through `whole`, `stages` (fused, plain or compiled networks) and `fused_layers`; bands through
`banded` and `banded_layers`, whose activations lie in `storage`. `plan` says what is done on which
device, `fold` turns timesteps and prompts into small tensors, `graphs` records launches.
"""

from importlib import import_module

_ORIGINS = {
    "EngineName": "plan",
    "EnginePlan": "plan",
    "NetworkLock": "lock",
    "OneStepEngine": "step",
    "TileSpec": "tile_spec",
    "batch_pixels": "batches",
    "choose_plan": "plan",
    "group_timesteps": "batches",
    "read_generators": "batches",
    "same_size_ranges": "batches",
}

__all__ = list(_ORIGINS)


def __getattr__(name: str) -> object:
    """Import a name when it is first asked for: most of this room needs the networks' libraries."""
    if name not in _ORIGINS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ORIGINS[name]}"), name)
