"""Find or build the networks that a run starts from."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import nn

from tadsr.checkpoints import load_checkpoint
from tadsr.checkpoints.base import find_folder, is_stable_diffusion, load_base
from tadsr.checkpoints.checkpoint import Checkpoint
from tadsr.networks.prompt_embeddings import PromptEmbeddings
from tadsr.networks.time_aware_vae import TimeAwareAutoencoderKL, neutralize_time_layers

_NETWORKS = {
    "vae": TimeAwareAutoencoderKL,
    "unet": UNet2DConditionModel,
    "prompt_embeddings": PromptEmbeddings,
}


def load_networks(model: str, *, vae: str | None = None, seed: int = 0) -> Checkpoint:
    """Load or build what a run starts from.

    Args:
        model: As in `TrainingConfig.model`.
        vae: As in `TrainingConfig.vae`.
        seed: Seed of networks built from a YAML file.

    Returns:
        The parts in float32, on the CPU, without gradients; adapters that the checkpoint keeps
        apart are attached.

    Raises:
        CheckpointError: A checkpoint is missing, damaged, unsafe or predicts anything but noise.
        ValueError: A YAML file describes no networks.
    """
    if Path(model).suffix in (".yaml", ".yml"):
        checkpoint = build_networks(model, seed)
    elif is_stable_diffusion(find_folder(model)):
        checkpoint = load_base(model)
    else:
        checkpoint = load_checkpoint(model, torch_dtype=torch.float32, merge_adapters=False)
    if vae is None:
        return checkpoint
    parts = checkpoint.components() | {"vae": load_checkpoint(vae, torch_dtype=torch.float32).vae}
    return Checkpoint(**parts, format=checkpoint.format, source=checkpoint.source)


def build_networks(path: str | Path, seed: int) -> Checkpoint:
    """Build networks at random weights from a YAML file of their configurations.

    Args:
        path: A mapping with `vae`, `unet` and `prompt_embeddings`, each the arguments of its
            class.
        seed: Seed of the weights.

    Returns:
        The networks with Stable Diffusion's noise schedule; the encoder's time layers change
        nothing yet, and the UNet predicts zero.

    Raises:
        ValueError: The file is missing, or describes no such networks.
    """
    try:
        configs = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path} must be a readable YAML file of networks: {error}") from error
    if not isinstance(configs, dict) or set(configs) != set(_NETWORKS):
        raise ValueError(f"{path} must describe exactly {', '.join(_NETWORKS)}, got {configs!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            parts = {name: make(**configs[name]) for name, make in _NETWORKS.items()}
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} makes no networks: {error}") from error
    neutralize_time_layers(parts["vae"])
    nn.init.zeros_(parts["unet"].conv_out.weight)
    nn.init.zeros_(parts["unet"].conv_out.bias)
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )
    for part in parts.values():
        part.requires_grad_(False).eval()
    return Checkpoint(**parts, scheduler=scheduler, format="built", source=str(path))


def keep_frozen_weights_in(dtype: torch.dtype, *modules: nn.Module | None) -> None:
    """Cast the weights of frozen matrix products in place; norms and trained weights stay float32.

    Args:
        dtype: What autocast computes such products in anyway.
        modules: Modules to go through; None is left out.
    """
    for module in (m for root in modules if root is not None for m in root.modules()):
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            parameters = list(module.parameters(recurse=False))
            if not any(p.requires_grad for p in parameters):
                for parameter in parameters:
                    parameter.data = parameter.data.to(dtype)
