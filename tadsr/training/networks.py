"""How a run's networks compute: types of their weights, and compilation."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from tadsr.networks.time_aware_vae import TimeAwareAutoencoderKL


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
