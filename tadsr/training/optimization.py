"""Optimizers of a stage's networks: learning rates, clipping, and steps that are checked first."""

from __future__ import annotations

import warnings

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tadsr.errors import TADSRWarning
from tadsr.training.muon import Muon, is_kernel
from tadsr.training.stages.stage import TrainedNetwork

_LONG_WARMUP = 0.1
"""Share of a run above which its warm-up is remarked on."""


def warn_of_long_warmup(networks: dict[str, TrainedNetwork], total_steps: int) -> None:
    """Warn of networks that would spend much of the run below their learning rate."""
    for name, network in networks.items():
        warmup = network.optimizer.warmup_steps
        if warmup > _LONG_WARMUP * total_steps:
            warnings.warn(
                f"the warm-up of {name} takes {warmup} of the run's {total_steps} steps, at less "
                "than the full learning rate; shorten warmup_steps or train longer",
                TADSRWarning,
                stacklevel=4,
            )


class Optimizers:
    """An AdamW per network, or an AdamW and a Muon."""

    def __init__(self, networks: dict[str, TrainedNetwork], accelerator: Accelerator) -> None:
        self.networks = networks
        self.accelerator = accelerator
        self.models: dict[str, nn.Module] = {}
        self.optimizers: dict[str, dict[str, torch.optim.Optimizer]] = {}
        self.parameters: dict[str, list[nn.Parameter]] = {}
        for name, (module, settings) in networks.items():
            named = {n: p for n, p in module.named_parameters() if p.requires_grad}
            self.parameters[name] = list(named.values())
            rate = settings.muon_learning_rate
            kernels = [n for n, p in named.items() if rate is not None and is_kernel(n, p)]
            others = [p for n, p in named.items() if n not in kernels]
            optimizers: dict[str, torch.optim.Optimizer] = {}
            if others:
                optimizers["lr"] = torch.optim.AdamW(
                    others,
                    lr=settings.learning_rate,
                    betas=settings.betas,
                    weight_decay=settings.weight_decay,
                )
            if kernels:
                optimizers["muon_lr"] = Muon(
                    [named[n] for n in kernels], rate, settings.weight_decay
                )
            prepared = accelerator.prepare(module, *optimizers.values())
            self.models[name] = prepared[0]
            self.optimizers[name] = dict(zip(optimizers, prepared[1:], strict=True))

    def set_learning_rates(self, step: int, total_steps: int) -> None:
        """Set every network's learning rate for a step."""
        for name, optimizers in self.optimizers.items():
            settings = self.networks[name].optimizer
            factor = settings.factor_at(step, total_steps)
            rates = {"lr": settings.learning_rate, "muon_lr": settings.muon_learning_rate}
            for label, optimizer in optimizers.items():
                for group in optimizer.param_groups:
                    group["lr"] = rates[label] * factor

    def learning_rates(self) -> dict[str, float]:
        """Return the learning rates as figures for a log."""
        return {
            f"{name}.{label}": optimizer.param_groups[0]["lr"]
            for name, optimizers in self.optimizers.items()
            for label, optimizer in optimizers.items()
        }

    def clip(self) -> dict[str, Tensor]:
        """Clip accumulated gradients; return the norm before by network, for those that have any.

        A network may have had no loss, such as a discriminator while latents are matched.
        """
        norms = {}
        for name, optimizers in self.optimizers.items():
            if any(p.grad is not None for p in self.parameters[name]):
                if self.accelerator.scaler is not None:
                    for optimizer in optimizers.values():
                        self.accelerator.scaler.unscale_(optimizer.optimizer)
                limit = self.networks[name].optimizer.max_grad_norm
                norms[name] = nn.utils.clip_grad_norm_(self.parameters[name], limit)
        return norms

    def step(self, names: dict[str, Tensor] | list[str]) -> None:
        """Step networks by the gradients that `clip` has clipped, and drop these."""
        scaler = self.accelerator.scaler
        for optimizer in (o for name in names for o in self.optimizers[name].values()):
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer.optimizer)
            optimizer.zero_grad(set_to_none=True)
        if scaler is not None:  # one scale serves all; it changes after the last
            scaler.update()
