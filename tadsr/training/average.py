"""An exponential average of a network's trained weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


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
