"""Load what training starts from, and what its runs leave: models that are no student yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn

from tadsr.checkpoints.checkpoint import Checkpoint
from tadsr.checkpoints.components import SHARED_VAE_KEYS, check_sizes, open_weights
from tadsr.checkpoints.detect import RUN_PROGRESS, detect_format, is_run_checkpoint, locate
from tadsr.checkpoints.hub import download
from tadsr.checkpoints.json_files import read_json
from tadsr.checkpoints.layout import NATIVE, OFFICIAL
from tadsr.checkpoints.load import load_checkpoint, load_parts
from tadsr.errors import CheckpointError
from tadsr.named_files import check_is_file, read_yaml
from tadsr.networks.adapter_targets import DEFAULT_ALPHA, DEFAULT_RANK
from tadsr.networks.adapters import attach_new_adapters, extract_adapters, has_adapters
from tadsr.networks.prompt_embeddings import PromptEmbeddings
from tadsr.networks.time_aware_vae import TimeAwareAutoencoderKL, neutralize_time_layers

_MAIN_NETWORKS = {"distillation": "student", "teacher": "teacher"}
"""File of what each kind of stage trains; an autoencoder's scale of latents is only measured at
the end, so that its checkpoints are no models."""
_NETWORKS = {
    "vae": TimeAwareAutoencoderKL,
    "unet": UNet2DConditionModel,
    "prompt_embeddings": PromptEmbeddings,
}


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


def load_start(model: str, *, vae: str | None = None, seed: int = 0) -> Checkpoint:
    """Load or build what a run starts from."""
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
    """Build networks at random weights from a YAML file; the UNet predicts zero."""
    configs = read_yaml(path)
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


def load_run_checkpoint(folder: Path) -> Checkpoint:
    """Load a checkpoint of a training run: what the run started from, with what it has trained.

    Averaged weights are taken where the run keeps them.
    """
    progress = read_json(folder / RUN_PROGRESS)
    config = run_config(folder)
    try:
        stage, step = config["stage"], progress["step"]
        kind, model, vae, seed = stage["kind"], config["model"], config["vae"], config["seed"]
        is_itself = folder.resolve() == Path(model).resolve()
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder} must tell its step and its run's model, vae, seed and stage, but {error}; "
            "copy the run again"
        ) from error
    if is_itself:
        raise CheckpointError(f"{folder} must be of a run that started elsewhere, got {model}")
    main = _MAIN_NETWORKS.get(kind)
    if main is None:
        raise CheckpointError(
            f"{folder} is a checkpoint of the stage {kind!r}, which is no model before "
            "it is exported: Trainer(config).export()"
        )
    try:
        start = load_start(model, vae=vae, seed=seed)
        check_is_file(folder / f"{main}.safetensors")
        tensors = load_file(folder / f"{main}.safetensors")
        if (folder / "average.safetensors").is_file():
            tensors |= load_file(folder / "average.safetensors")
    except (CheckpointError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{folder} is a checkpoint of a run that started from {model}, which must "
            f"still be there: {error}"
        ) from error
    unet, vae = start.unet, start.vae
    if kind == "distillation":
        make_trainable(start, stage.get("adapter_rank"), stage.get("adapter_alpha"))
        if not stage.get("tae", True):
            neutralize_time_layers(vae)
    modules = {n: m for n, m in start.components().items() if isinstance(m, nn.Module)}
    states = {name: module.state_dict() for name, module in modules.items()}
    with torch.no_grad():
        for name, tensor in tensors.items():
            part, _, inner = name.partition(".")
            state = states.get(part, {})
            if inner not in state or state[inner].shape != tensor.shape:
                raise CheckpointError(
                    f"{folder} must hold what was trained of {model}, but {name} does not fit it"
                )
            state[inner].copy_(tensor)
    parts = start.components()
    parts["adapters"] = extract_adapters(unet, vae) if has_adapters(unet) else None
    parts["metadata"] = {**start.metadata, "training_steps": step}
    for part in (unet, vae):
        part.requires_grad_(False).eval()
    return Checkpoint(**parts, format="run", source=str(folder))


def make_trainable(checkpoint: Checkpoint, rank: int | None, alpha: float | None) -> None:
    """Attach new adapters to a checkpoint that keeps none apart.

    Args:
        rank: Rank; 0 attaches nothing, None is the published one.
        alpha: Numerator of the scaling; None keeps the published alpha / rank.
    """
    if checkpoint.adapters is None and rank != 0:
        rank = DEFAULT_RANK if rank is None else rank
        alpha = rank * DEFAULT_ALPHA / DEFAULT_RANK if alpha is None else alpha
        attach_new_adapters(checkpoint.unet, checkpoint.vae, rank=rank, alpha=alpha)


def run_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of the run that a checkpoint belongs to."""
    progress = read_json(folder / RUN_PROGRESS)
    if "config" in progress:
        return progress["config"]
    return read_json(folder.parent.parent / "config.json")


def base_of(model: str) -> str:
    """Return the model that a chain of runs started from, or the model itself if it is none."""
    while is_run_checkpoint(Path(model)):
        config = run_config(Path(model))
        model = config["stage"].get("teacher") or config["model"]
    return model
