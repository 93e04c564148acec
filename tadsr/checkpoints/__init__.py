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
        "tadsr.checkpoints.adapter_files": "load_adapters save_adapters",
        "tadsr.checkpoints.checkpoint": "Checkpoint",
        "tadsr.checkpoints.inspect": "CheckpointInfo ComponentInfo inspect_checkpoint",
        "tadsr.checkpoints.load": "load_checkpoint",
        "tadsr.checkpoints.save": "convert_checkpoint save_native save_official",
    },
)
