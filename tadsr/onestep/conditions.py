"""What the one step is taken at: timesteps and prompts, as they were given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tadsr.conditioning import TimestepField
from tadsr.prompts import Prompts


@dataclass(frozen=True, eq=False)
class Conditions:
    """Timesteps, prompts and noise that the step on a batch is conditioned on."""

    timesteps: Sequence[int] | TimestepField
    """One per image, or a map per image."""
    prompts: Prompts
    """One per image."""
    device: torch.device
    """Where the networks run."""
    generator: torch.Generator | None = None
    """Samples the posterior; None takes its mean."""

    def __getitem__(self, images: slice) -> Conditions:
        """Return the conditions of some of the images."""
        return replace(self, timesteps=self.timesteps[images], prompts=self.prompts[images])

    @property
    def batch(self) -> int:
        """Number of images."""
        return len(self.prompts.embeds)

    @property
    def num_runs(self) -> int:
        """How often the networks run: once, or once for every knot of maps."""
        return len(self.timesteps.knots) if isinstance(self.timesteps, TimestepField) else 1

    def mix(
        self, results: Sequence[Tensor], size: tuple[int, int], rows: tuple[int, int] | None = None
    ) -> Tensor:
        """Mix results by maps, as `TimestepField.mix`; without maps return the only one."""
        if isinstance(self.timesteps, TimestepField):
            return self.timesteps.mix(results, size, rows)
        return results[0]
