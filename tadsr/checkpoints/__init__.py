"""Checkpoints: detect, load, save, convert and inspect them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tadsr.lazily import lazy_names

if TYPE_CHECKING:
    from tadsr.checkpoints.adapter_files import load_adapters, save_adapters
    from tadsr.checkpoints.checkpoint import Checkpoint
    from tadsr.checkpoints.inspect import CheckpointInfo, ComponentInfo, inspect_checkpoint
    from tadsr.checkpoints.load import load_checkpoint
    from tadsr.checkpoints.save import convert_checkpoint, save_native, save_official

# A command that finds a misspelt model here imports no torch.
__getattr__ = lazy_names(
    __name__,
    {
        "Checkpoint": "tadsr.checkpoints.checkpoint",
        "CheckpointInfo": "tadsr.checkpoints.inspect",
        "ComponentInfo": "tadsr.checkpoints.inspect",
        "convert_checkpoint": "tadsr.checkpoints.save",
        "inspect_checkpoint": "tadsr.checkpoints.inspect",
        "load_adapters": "tadsr.checkpoints.adapter_files",
        "load_checkpoint": "tadsr.checkpoints.load",
        "save_adapters": "tadsr.checkpoints.adapter_files",
        "save_native": "tadsr.checkpoints.save",
        "save_official": "tadsr.checkpoints.save",
    },
)
