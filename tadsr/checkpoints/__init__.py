"""Checkpoints: detect, load, save, convert and inspect them."""

from tadsr.checkpoints.adapter_files import load_adapters, save_adapters
from tadsr.checkpoints.checkpoint import Checkpoint
from tadsr.checkpoints.inspect import CheckpointInfo, ComponentInfo, inspect_checkpoint
from tadsr.checkpoints.load import load_checkpoint
from tadsr.checkpoints.save import convert_checkpoint, save_native, save_official

__all__ = [
    "Checkpoint",
    "CheckpointInfo",
    "ComponentInfo",
    "convert_checkpoint",
    "inspect_checkpoint",
    "load_adapters",
    "load_checkpoint",
    "save_adapters",
    "save_native",
    "save_official",
]
