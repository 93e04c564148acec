"""Read and write adapters: the published pickle and our safetensors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tadsr.checkpoints.tensor_files import TensorReader, check_tensors, read_pickle
from tadsr.errors import CheckpointError
from tadsr.networks.adapter_targets import DEFAULT_ALPHA, AdapterSet

NATIVE_FORMAT = "tadsr-adapters-1"
"""The `format` in the metadata of adapters.safetensors."""

_PICKLE_PARTS = {
    "unet": "state_dict_unet",
    "vae": "state_dict_vae",
    "vae_time": "state_dict_vae_time",
}
_PICKLE_MODULES = {
    "unet_lora_encoder_modules": ("unet_modules", "default_encoder"),
    "unet_lora_decoder_modules": ("unet_modules", "default_decoder"),
    "unet_lora_others_modules": ("unet_modules", "default_others"),
    "vae_lora_encoder_modules": ("vae_modules", "default_encoder"),
}
_PICKLE_RANKS = ("rank_unet", "rank_vae")


def load_adapters(path: str | Path) -> AdapterSet:
    """Load adapters from a published pickle or from our safetensors file.

    Args:
        path: `tadsr.pkl` (.pkl, .pt, .bin) or `adapters.safetensors`.

    Returns:
        The adapters, on the CPU, in their stored dtype.

    Raises:
        CheckpointError: The file is missing, damaged, unsafe or lacks something.
    """
    path = Path(path)
    adapters = _load_native(path) if path.suffix == ".safetensors" else _load_official(path)
    for part in _PICKLE_RANKS:
        rank = getattr(adapters, part)
        if not isinstance(rank, int) or rank < 1:
            raise CheckpointError(f"{path} must give {part} as an integer from 1, got {rank!r}")
    if type(adapters.alpha) not in (int, float) or not 0 < adapters.alpha < math.inf:
        raise CheckpointError(f"{path} must give a finite alpha, got {str(adapters.alpha)[:80]}")
    for _, name, tensor in _all_tensors(adapters):
        if not tensor.is_floating_point():
            raise CheckpointError(f"{path} must hold floats, but {name} is {tensor.dtype}")
    return adapters


def save_adapters(adapters: AdapterSet, path: str | Path) -> None:
    """Write adapters as safetensors or as the published pickle, by the suffix.

    Args:
        adapters: The adapters; stored in their own dtype.
        path: A .safetensors file, or a .pkl file for the published format.

    Raises:
        CheckpointError: The published format cannot hold an alpha other than 8.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        tensors = {f"{part}.{n}": t for part, n, t in _all_tensors(adapters)}
        metadata = {
            "format": NATIVE_FORMAT,
            "rank_unet": str(adapters.rank_unet),
            "rank_vae": str(adapters.rank_vae),
            "alpha": json.dumps(adapters.alpha),
        }
        save_file(tensors, path, metadata=metadata)
        return
    if adapters.alpha != DEFAULT_ALPHA:
        raise CheckpointError(
            f"the published format implies alpha {DEFAULT_ALPHA}, but these adapters have "
            f"{adapters.alpha}; save the native format instead"
        )
    data: dict[str, Any] = {key: {} for key in _PICKLE_PARTS.values()}
    for part, name, tensor in _all_tensors(adapters):
        data[_PICKLE_PARTS[part]][name] = tensor
    for key, (attribute, adapter) in _PICKLE_MODULES.items():
        data[key] = getattr(adapters, attribute)[adapter]
    for key in _PICKLE_RANKS:
        data[key] = getattr(adapters, key)
    torch.save(data, path)


def _all_tensors(adapters: AdapterSet) -> list[tuple[str, str, Tensor]]:
    return [
        (part, name, tensor.detach().cpu().contiguous())
        for part in _PICKLE_PARTS
        for name, tensor in getattr(adapters, part).items()
    ]


def _load_native(path: Path) -> AdapterSet:
    reader = TensorReader([path])
    metadata = reader.metadata
    if metadata.get("format") != NATIVE_FORMAT:
        raise CheckpointError(
            f"{path} must be adapters of format {NATIVE_FORMAT!r}, got "
            f"{metadata.get('format')!r}; give a file that tadsr wrote, or tadsr.pkl"
        )
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PICKLE_PARTS}
    for full_name, tensor in reader.items():
        part, _, name = full_name.partition(".")
        if part not in parts:
            raise CheckpointError(
                f"{path} must hold tensors under {sorted(parts)} only, got {full_name!r}"
            )
        parts[part][name] = tensor
    try:
        ranks = {key: int(metadata[key]) for key in _PICKLE_RANKS}
        alpha = json.loads(metadata["alpha"])
    except (KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} must state ranks and alpha: {error!r}") from error
    return AdapterSet(**parts, **ranks, alpha=alpha)


def _load_official(path: Path) -> AdapterSet:
    data = read_pickle(path)
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{path} must hold a mapping, got {type(data).__name__}")
    expected = {*_PICKLE_PARTS.values(), *_PICKLE_MODULES, *_PICKLE_RANKS}
    missing, extra = sorted(expected - data.keys()), sorted(map(str, data.keys() - expected))
    if missing or extra:
        raise CheckpointError(
            f"{path} must have the {len(expected)} keys of a published adapter, but "
            f"{len(missing)} are missing {missing[:5]} and {len(extra)} are extra {extra[:5]}"
        )
    for key in _PICKLE_PARTS.values():
        check_tensors(data[key], f"{path} under {key!r}")
    adapters = AdapterSet(
        **{part: dict(data[key]) for part, key in _PICKLE_PARTS.items()},
        **{key: data[key] for key in _PICKLE_RANKS},
        alpha=DEFAULT_ALPHA,
    )
    for key, (attribute, adapter) in _PICKLE_MODULES.items():
        listed, found = data[key], getattr(adapters, attribute).get(adapter, [])
        if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
            raise CheckpointError(f"{path} must list modules under {key!r}, got other values")
        if set(listed) != set(found):
            raise CheckpointError(
                f"{path} must hold matrices for exactly the modules in {key!r}; they differ in "
                f"{sorted(set(listed) ^ set(found))[:5]}"
            )
    return adapters
