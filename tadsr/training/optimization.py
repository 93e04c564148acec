"""Optimizers of a stage's networks, and the average of what they train."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tadsr.errors import TADSRWarning
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
                (group,) = optimizer.param_groups
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


MOMENTUM = 0.95
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration, which takes singular values to about 1."""
_ITERATIONS = 5
_RMS_OF_ADAMW = 0.2
"""Root mean square of AdamW's steps per learning rate, which is given to these steps too."""
_NUMBERS_AT_ONCE = 1 << 24
"""Of parameters that are stepped together, each of their copies taking 64 MB in float32."""
_FEWEST_ROWS = 5
"""Kernels of fewer outputs, such as an image's colours, are left to AdamW."""


class Muon(torch.optim.Optimizer):
    """Momentum that is orthogonalised, for convolution kernels and matrices.

    `torch.optim.Muon` takes matrices alone, and computes in bfloat16, which is slow on most CPUs.

    Args:
        params: Parameters of at least two dimensions; the first is taken for the rows.
        lr: Learning rate, on the scale of AdamW's; a tensor on the parameters' device where steps
            are recorded as a CUDA graph.
        weight_decay: Decoupled weight decay, at least 0.

    Source: https://kellerjordan.github.io/posts/muon; the scale is that of arXiv 2502.16982.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float | Tensor, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Step all parameters that have a gradient."""
        for group in self.param_groups:
            alike: dict[tuple, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    kind = (parameter.flatten(1).shape, parameter.dtype, parameter.device)
                    alike.setdefault(kind, []).append(parameter)
            for (shape, *_), parameters in alike.items():
                # Small products cost more to start than to compute, so equal shapes share them.
                at_once = max(1, _NUMBERS_AT_ONCE // shape.numel())
                for first in range(0, len(parameters), at_once):
                    self._step_alike(parameters[first : first + at_once], group)

    def _step_alike(self, parameters: list[Tensor], group: dict) -> None:
        """Step parameters that are matrices of one shape."""
        gradients = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_mul_(momenta, MOMENTUM)
        torch._foreach_add_(momenta, gradients)
        ahead = torch._foreach_add(gradients, momenta, alpha=MOMENTUM)
        ahead = torch.stack([matrix.flatten(1) for matrix in ahead])
        scale = _RMS_OF_ADAMW * max(ahead.shape[1:]) ** 0.5
        directions = orthogonalize(ahead) * (group["lr"] * scale)
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        steps = [d.view_as(p) for d, p in zip(directions, parameters, strict=True)]
        torch._foreach_sub_(parameters, steps)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return matrices of the same singular vectors, with singular values of about 1.

    Args:
        matrices: (..., rows, columns).

    Returns:
        Shaped and typed as `matrices`; computed in float32.

    Source: Newton-Schulz iteration of https://kellerjordan.github.io/posts/muon.
    """
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if is_tall else matrices).float()
    x = x.reshape(-1, *x.shape[-2:])
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    a, b, c = _NEWTON_SCHULZ
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).reshape(matrices.shape).to(matrices.dtype)


def is_kernel(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon steps a parameter: kernels and matrices, but not embeddings' or times'."""
    return (
        parameter.ndim >= 2
        and parameter.shape[0] >= _FEWEST_ROWS
        and not any(word in name for word in ("embed", "time"))
    )


class WeightAverage:
    """Average the trained weights of a network; a decay of 0 switches it off.

    Args:
        decay: Decay per step, in [0, 1).
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = {
            n: p for n, p in network.named_parameters() if decay > 0 and p.requires_grad
        }
        self.tensors: dict[str, Tensor] = {
            n: p.detach().clone() for n, p in self.parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step, from 0."""
        if self.tensors:
            # A short average at the start, or the first weights would linger in it.
            decay = min(self.decay, (1 + step) / (10 + step))
            current = [p.detach() for p in self.parameters.values()]
            torch._foreach_lerp_(list(self.tensors.values()), current, 1 - decay)

    def use(self) -> None:
        """Replace the weights by their average."""
        self._put(self.tensors)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Replace the weights by their average for a block of code."""
        before = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.use()
        try:
            yield
        finally:
            self._put(before)

    @torch.no_grad()
    def _put(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.parameters[name].copy_(tensor)
