"""Load diffusion models that are no student: Stable Diffusion 2.1-base, or what stands for it."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from tadsr.checkpoints.architectures import SHARED_VAE_KEYS, check_sizes
from tadsr.checkpoints.checkpoint import Checkpoint
from tadsr.checkpoints.components import open_weights
from tadsr.checkpoints.detect import detect_format, locate
from tadsr.checkpoints.hub import download
from tadsr.checkpoints.json_files import read_json
from tadsr.checkpoints.layout import NATIVE, OFFICIAL
from tadsr.checkpoints.load import load_checkpoint, load_parts
from tadsr.errors import CheckpointError
from tadsr.networks.time_aware_vae import TimeAwareAutoencoderKL, neutralize_time_layers


def find_folder(source: str | Path) -> Path:
    """Return a checkpoint's folder, downloaded if it is a hub id; raises CheckpointError."""
    return locate(source) or download(str(source), needs_adapter=False)


def is_stable_diffusion(folder: Path) -> bool:
    """Tell whether a folder is plain Stable Diffusion, whose encoder knows no time."""
    index = folder / "model_index.json"
    if not index.is_file() or not (folder / "vae" / "config.json").is_file():
        return False
    return str(read_json(index).get("_class_name")).startswith("StableDiffusion")


def load_base(source: str | Path) -> Checkpoint:
    """Load a diffusion model without a student's adapters, as a teacher or to start from.

    Args:
        source: Stable Diffusion 2.1-base (folder or hub id), a published checkpoint (its base
            model is taken), or a native checkpoint without adapters kept apart.

    Returns:
        The parts in float32, on the CPU, in eval mode, without gradients. The encoder of Stable
        Diffusion gets time layers that change nothing yet.
    """
    folder = find_folder(source)
    if is_stable_diffusion(folder):
        parts = load_parts(folder, NATIVE, vae=_load_sd_vae(folder))
        return Checkpoint(**parts, format="stable-diffusion", source=str(source))
    if detect_format(folder) is OFFICIAL:
        parts = load_parts(folder, OFFICIAL)
        return Checkpoint(**parts, format=OFFICIAL.name, source=str(source))
    if (folder / NATIVE.adapter_file).is_file():
        raise CheckpointError(
            f"{source} must be a model without a student's adapters, but holds "
            f"{NATIVE.adapter_file}; name the model that the student was distilled from"
        )
    return load_checkpoint(folder)


def time_aware_from_sd(vae: AutoencoderKL) -> TimeAwareAutoencoderKL:
    """Give Stable Diffusion's autoencoder time layers that change nothing yet."""
    config = {k: vae.config[k] for k in SHARED_VAE_KEYS if k in vae.config}
    try:
        time_aware = TimeAwareAutoencoderKL(**config)
        missing, unexpected = time_aware.load_state_dict(vae.state_dict(), strict=False)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"the autoencoder must be Stable Diffusion's: {error}") from error
    absent = [n for n in missing if "time_emb" not in n]
    if absent or unexpected:
        raise CheckpointError(
            "the autoencoder must be Stable Diffusion's, but these tensors are missing or extra: "
            f"{[*absent, *unexpected][:5]}"
        )
    neutralize_time_layers(time_aware)
    return time_aware.requires_grad_(False).eval()


def _load_sd_vae(folder: Path) -> TimeAwareAutoencoderKL:
    component = NATIVE.component("vae")
    path = folder / component.folder / component.config
    check_sizes("vae", read_json(path), path, open_weights(folder, component, NATIVE, None))
    try:
        # Diffusers knows the older names of the attention's tensors.
        vae = AutoencoderKL.from_pretrained(
            folder / "vae", use_safetensors=True, torch_dtype=torch.float32, local_files_only=True
        )
    except Exception as error:  # diffusers raises many types
        raise CheckpointError(f"{folder / 'vae'} makes no autoencoder: {error}") from error
    return time_aware_from_sd(vae)
