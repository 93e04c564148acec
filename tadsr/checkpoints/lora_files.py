"""Read LoRA files of other programs: diffusers, PEFT, and those named lora_unet_... ."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.utils.state_dict_utils import (
    StateDictType,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from torch import Tensor, nn

from tadsr.checkpoints.components import clip_common_name
from tadsr.checkpoints.json_files import read_json, user_path
from tadsr.checkpoints.tensor_files import TensorReader
from tadsr.errors import CheckpointError
from tadsr.networks.adapters import LoraProduct, plain_state_dict

_FOLDER_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
_PEFT_CONFIG = "adapter_config.json"
_DIFFUSERS_METADATA = "lora_adapter_metadata"
_PARTS = ("unet", "text_encoder")
_FLAT_PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te_text_model_": "text_encoder",
}
_TENSOR = re.compile(
    r"(?P<module>.+?)(?:\.lora_(?P<side>A|B|down|up)(?:\.(?!weight$)\w+)?\.weight"
    r"|(?:\.lora)?\.alpha)"
)
_ROLES = {"down": "A", "up": "B", None: "alpha"}
# The names are patterns; one from elsewhere may take for ever, unless it repeats next to nothing.
_PATTERN = re.compile(r"\^?[\w.\\]*(\.\*[\w.\\]*){0,2}\$?")


def read_lora(
    source: str | Path, unet: nn.Module, text_encoder: nn.Module | None
) -> dict[str, list[LoraProduct]]:
    """Read a LoRA and check that every tensor of it has a place in these models."""
    path = _find(user_path(source))
    reader = TensorReader([path])
    models = {"unet": unet, "text_encoder": text_encoder}
    shapes = {part: _weight_shapes(m, part) for part, m in models.items() if m is not None}
    flat = {
        f"{prefix}{module.replace('.', '_')}": (part, module)
        for prefix, part in _FLAT_PREFIXES.items()
        for module in shapes.get(part, ())
    }
    entries: dict[tuple[str, str], dict[str, Tensor]] = {}
    unknown = []
    for name, tensor in reader.items():
        found = _TENSOR.fullmatch(_peft_name(name))
        if found is None or (found["side"] is None and tensor.numel() != 1):
            unknown.append(f"{name} {tuple(tensor.shape)}")
        else:
            entry = entries.setdefault(_place(found["module"], flat), {})
            entry[_ROLES.get(found["side"], found["side"])] = tensor
    settings = _settings(path, reader.metadata)
    products: dict[str, list[LoraProduct]] = {part: [] for part in _PARTS}
    for (part, module), entry in entries.items():
        a, b = entry.get("A"), entry.get("B")
        if part not in shapes:
            unknown.append(f"{part}.{module} (the model has no {part})")
        elif a is None or b is None:
            unknown.append(f"{part}.{module} (only one of its two matrices)")
        elif module not in shapes[part]:
            unknown.append(f"{part}.{module}")
        elif not _fits(a, b, shapes[part][module][1]):
            found, expected = [tuple(a.shape), tuple(b.shape)], tuple(shapes[part][module][1])
            unknown.append(f"{part}.{module} {found} for {expected}")
        else:
            scaling = _scaling(path, settings.get(part, {}), module, entry.get("alpha"), len(a))
            products[part].append(LoraProduct(shapes[part][module][0], a, b, scaling))
    if not entries and not unknown:
        raise CheckpointError(f"{path} must be a LoRA for this model, but holds no LoRA")
    if unknown:
        raise CheckpointError(
            f"{path} must be a LoRA for this model, but {len(unknown)} of its parts have no place "
            f"in it ({'; '.join(unknown[:5])}); give one that was trained for the same base model "
            "(SD 2.1-base), in diffusers' or PEFT's format and without DoRA"
        )
    return products


def _find(source: Path) -> Path:
    if source.is_dir():
        for name in _FOLDER_FILES:
            if (source / name).is_file():
                return source / name
        raise CheckpointError(f"{source} must hold {' or '.join(_FOLDER_FILES)}, but holds neither")
    if source.suffix != ".safetensors":
        raise CheckpointError(
            f"a LoRA must be a .safetensors file or a folder with one, got {source}; pickles are "
            "not read: save it again with diffusers or PEFT"
        )
    return source


def _weight_shapes(model: nn.Module, part: str) -> dict[str, tuple[str, Any]]:
    """Map modules, by the name that all files share, to their weights' names and shapes."""
    shapes = {}
    for name, tensor in plain_state_dict(model).items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight":
            shapes[_common(part, module)] = (name, tensor.shape)
    return shapes


def _common(part: str, module: str) -> str:
    return (clip_common_name(module) or "") if part == "text_encoder" else module


def _peft_name(name: str) -> str:
    """Turn a name that diffusers has given a tensor at any time into PEFT's."""
    if name.startswith("text_encoder."):
        (name,) = convert_state_dict_to_peft({name: None}, StateDictType.DIFFUSERS_OLD)
    (name,) = convert_unet_state_dict_to_peft({name: None})
    return name


def _place(module: str, flat: Mapping[str, tuple[str, str]]) -> tuple[str, str]:
    """Tell which part and module a name in a file means; a bare name means the UNet's."""
    if module in flat:
        return flat[module]
    module = module.removeprefix("base_model.model.")
    for part in _PARTS:
        if module.startswith(f"{part}."):
            return part, _common(part, module.removeprefix(f"{part}."))
    return "unet", module


def _fits(a: Tensor, b: Tensor, shape: Any) -> bool:
    return (
        min(a.ndim, b.ndim, len(shape)) >= 2
        and 0 < len(a) == b.flatten(1).shape[1]
        and len(b) == shape[0]
        and math.prod(a.shape[1:]) == math.prod(shape[1:])
    )


def _settings(path: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return what the file, or the configuration beside it, says of each part's scaling."""
    if _DIFFUSERS_METADATA in metadata:
        try:
            stated = dict(json.loads(metadata[_DIFFUSERS_METADATA]))
        except (ValueError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path} has damaged metadata: {error}") from error
        parts = {part: {} for part in _PARTS}
        for name, value in stated.items():
            part, _, key = name.partition(".")
            parts.get(part, {})[key] = value
        return parts
    config = path.with_name(_PEFT_CONFIG)
    if path.name == _FOLDER_FILES[1] and config.is_file():
        return {"unet": read_json(config)}
    return {}


def _scaling(
    path: Path, settings: Mapping[str, Any], module: str, stored: Tensor | None, rank: int
) -> float:
    """Return alpha over rank; 1 where a file does not say."""
    if settings.get("use_dora"):
        raise CheckpointError("a LoRA must be without DoRA, whose sizes need the base's norms")
    alpha = None if stored is None else float(stored)
    if alpha is None:
        patterns = settings.get("alpha_pattern") or {}
        if not isinstance(patterns, dict) or not all(map(_PATTERN.fullmatch, patterns)):
            raise CheckpointError(f"{path} must have modules' names under alpha_pattern")
        fitting = [v for k, v in patterns.items() if re.fullmatch(rf"(.*\.)?({k})", module)]
        alpha = fitting[0] if fitting else settings.get("lora_alpha", rank)
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise CheckpointError(f"{path} must have a number as alpha, got {str(alpha)[:80]}")
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
