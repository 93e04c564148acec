"""How a run computes: device, precision, processes and compilation."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from diffusers import UNet2DConditionModel
from torch import nn

from tadsr.errors import TrainingError
from tadsr.networks.time_aware_vae import TimeAwareAutoencoderKL
from tadsr.training.training_config import TrainingConfig

_SHARDING = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")
"""Plug-ins of accelerate that cut networks into pieces, by what switches them on."""


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """Set accelerate up for a run."""
    switches = {s: os.environ.get(f"ACCELERATE_USE_{s}", "") for s in _SHARDING}
    sharding = [s for s, value in switches.items() if value.lower() == "true"]
    if sharding:
        raise TrainingError(
            f"training must run on whole networks, but accelerate is set to {sharding[0]}, which "
            "cuts them up; launch with --multi_gpu. With LoRA a network and its optimizer fit one "
            "card"
        )
    stage = config.stage
    # Only then does a step leave trained parameters out.
    skips_decoder = getattr(stage, "latent_steps", 0) > 0 and stage.train_decoder
    arguments = {
        "mixed_precision": "no" if config.precision == "fp32" else config.precision,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "cpu": config.device == "cpu",
        "log_with": list(config.trackers) or None,
        "project_dir": config.output,
        "kwargs_handlers": [DistributedDataParallelKwargs(find_unused_parameters=skips_decoder)],
    }
    if config.device == "cpu" or not torch.cuda.is_available():
        if config.precision == "fp16":
            raise ValueError("precision fp16 needs a GPU; take bf16 or fp32 on the CPU")
        if config.compile:
            # With torch 2.13.0, gradients through the decoder came out as 0, without an error.
            raise ValueError(
                "compile needs a GPU: inductor loses gradients on the CPU; leave it off"
            )
    torch.backends.cuda.matmul.allow_tf32 = config.tf32
    torch.backends.cudnn.allow_tf32 = config.tf32
    try:
        return Accelerator(**arguments)
    except ValueError as error:
        if "AcceleratorState" not in str(error):
            raise
        # Accelerate keeps the first run's precision for the whole process.
        AcceleratorState._reset_state()
        return Accelerator(**arguments)


def keep_frozen_weights_in(dtype: torch.dtype, *modules: nn.Module | None) -> None:
    """Cast the weights of frozen matrix products in place; norms and trained ones stay float32."""
    for module in (m for root in modules if root is not None for m in root.modules()):
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            parameters = list(module.parameters(recurse=False))
            if not any(p.requires_grad for p in parameters):
                for parameter in parameters:
                    parameter.data = parameter.data.to(dtype)


def compile_networks(modules: Iterable[nn.Module]) -> None:
    """Compile the UNets and autoencoders among some modules, in place."""
    for module in {m for root in modules for m in root.modules()}:
        if isinstance(module, UNet2DConditionModel):
            module.compile()
        elif isinstance(module, TimeAwareAutoencoderKL):
            module.encoder.compile()
            module.decoder.compile()
