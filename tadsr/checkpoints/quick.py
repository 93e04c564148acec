"""Load a model for the fused engine alone, without the seconds that diffusers' import takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tadsr.checkpoints.components import (
    check_sizes,
    find_components,
    open_weights,
    read_scheduler,
)
from tadsr.checkpoints.detect import (
    detect_format,
    find_adapter,
    is_run_checkpoint,
    locate,
    read_metadata,
)
from tadsr.checkpoints.json_files import read_json
from tadsr.checkpoints.layout import NATIVE
from tadsr.checkpoints.tensor_files import load_strict
from tadsr.networks.bare import Bare, BarePrompts, build_bare, has_known_blocks
from tadsr.schedule import make_alphas_cumprod


class BareCheckpoint(NamedTuple):
    """The parts of a checkpoint that the fused engine needs, on the CPU."""

    vae: Bare
    unet: Bare
    prompt_embeddings: BarePrompts
    alphas_cumprod: Tensor
    metadata: dict[str, Any]


def load_bare(source: str | Path, dtype: torch.dtype) -> BareCheckpoint | None:
    """Load the bare layers of a native checkpoint without text encoder, or None for any other."""
    folder = locate(source)
    if folder is None or is_run_checkpoint(folder) or detect_format(folder) is not NATIVE:
        return None
    present = find_components(folder, NATIVE)
    if "text_encoder" in present or find_adapter(folder, NATIVE, None) is not None:
        return None
    try:
        return _load(folder, present, dtype)
    except Exception:  # whatever is wrong, the errors of the full way are the better ones
        return None


def _load(folder: Path, present: dict[str, Any], dtype: torch.dtype) -> BareCheckpoint | None:
    paths = {name: folder / part.folder / part.config for name, part in present.items()}
    configs = {name: read_json(path) for name, path in paths.items()}
    if any(c.get("_class_name") not in (None, present[n].class_name) for n, c in configs.items()):
        return None
    scheduler = read_scheduler(paths["scheduler"])
    trained_betas = scheduler.pop("trained_betas")
    if trained_betas is not None or not has_known_blocks(configs["unet"], configs["vae"]):
        return None
    parts: dict[str, Any] = {}
    for name in ("vae", "unet", "prompt_embeddings"):
        reader = open_weights(folder, present[name], NATIVE, None)
        config = check_sizes(name, configs[name], paths[name], reader)
        shapes = {tensor: tuple(shape) for tensor, (shape, _) in reader.meta.items()}
        if name == "prompt_embeddings":
            model = BarePrompts(config["prompts"], shapes["embeddings"])
        else:
            model = build_bare(name, config, shapes)
        parts[name] = load_strict(model, reader, dtype=dtype)
    alphas_cumprod = make_alphas_cumprod(**scheduler)
    metadata = read_metadata(folder, NATIVE)
    return BareCheckpoint(**parts, alphas_cumprod=alphas_cumprod, metadata=metadata)
