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
        indices: Global index of each sample of a batch, (B,), int64.
    """

    def __init__(self, seed: int, indices: Tensor, device: torch.device | str = "cpu") -> None:
        self.seed = seed
        self.indices = indices.tolist()
        self.device = device

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """Return standard normal noise, (B, *shape), float32."""
        device = self.device
        generators = self._generators(purpose, device)
        return torch.stack([torch.randn(shape, generator=g, device=device) for g in generators])

    def integers(self, purpose: str, low: int, high: int) -> Tensor:
        """Return uniform integers of low..high, both included, (B,), int64."""
        return self._send(torch.tensor(self.numbers(purpose, low, high)))

    def numbers(self, purpose: str, low: int, high: int) -> list[int]:
        """Return `integers` as Python ints, without waiting for the device."""
        generators = self._generators(purpose)
        return [torch.randint(low, high + 1, (), generator=g).item() for g in generators]

    def chances(self, purpose: str, probability: float) -> list[bool]:
        """Draw for each sample whether an event of a given probability happens."""
        generators = self._generators(purpose)
        return [torch.rand((), generator=g).item() < probability for g in generators]

    def _send(self, values: Tensor) -> Tensor:
        is_cuda = torch.device(self.device).type == "cuda"
        return values.pin_memory().to(self.device, non_blocking=True) if is_cuda else (
            values.to(self.device)
        )  # fmt: skip

    def _generators(
        self, purpose: str, device: torch.device | str = "cpu"
    ) -> list[torch.Generator]:
        key = _PURPOSES.index(purpose)
        # SeedSequence mixes the key: neighbouring seeds alone would give related streams.
        seeds = [
            int(np.random.SeedSequence([self.seed, key, i]).generate_state(1, np.uint64)[0])
            for i in self.indices
        ]
        return [torch.Generator(device).manual_seed(seed & (2**63 - 1)) for seed in seeds]
