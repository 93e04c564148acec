"""Randomness that belongs to a sample, whatever process, batch or restart it falls into."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_PURPOSES = ("student timestep", "vsd noise", "vsd timestep", "diffusion noise",
             "diffusion timestep", "posterior noise", "condition", "perceptual top",
             "perceptual left")  # fmt: skip


class SampleRandomness:
    """Draw random numbers as functions of (seed, sample, purpose).

    Args:
        seed: The run's seed.
        indices: Global index of each sample of a batch, (B,), int64.
        device: Where tensors are wanted. Numbers are drawn on the CPU, so that every device
            trains on the same ones.
    """

    def __init__(self, seed: int, indices: Tensor, device: torch.device | str = "cpu") -> None:
        self.seed = seed
        self.indices = indices.tolist()
        self.device = device

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """Return standard normal noise, (B, *shape), float32."""
        rows = [torch.randn(shape, generator=g) for g in self._generators(purpose)]
        return torch.stack(rows).to(self.device)

    def integers(self, purpose: str, low: int, high: int) -> Tensor:
        """Return uniform integers of low..high, both included, (B,), int64."""
        rows = [torch.randint(low, high + 1, (), generator=g) for g in self._generators(purpose)]
        return torch.stack(rows).to(self.device)

    def uniform(self, purpose: str) -> Tensor:
        """Return uniform numbers in [0, 1), (B,), float32."""
        rows = [torch.rand((), generator=g) for g in self._generators(purpose)]
        return torch.stack(rows).to(self.device)

    def _generators(self, purpose: str) -> list[torch.Generator]:
        key = _PURPOSES.index(purpose)
        # SeedSequence mixes the key: neighbouring seeds alone would give related streams.
        seeds = [
            int(np.random.SeedSequence([self.seed, key, i]).generate_state(1, np.uint64)[0])
            for i in self.indices
        ]
        return [torch.Generator().manual_seed(seed & (2**63 - 1)) for seed in seeds]
