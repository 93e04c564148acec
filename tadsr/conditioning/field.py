"""The maps of a batch of images, and how their timesteps come together in one result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from tadsr.conditioning.timestep_map import TimestepMap

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class TimestepField:
    """The maps of a batch of images, in place of timesteps (B,).

    The networks run once for every knot of the maps, each time on the whole image with one
    timestep, and every pixel mixes the results by its own timestep. Giving each position's timestep
    to one single run does not work: GroupNorm sees the whole image, and the UNet's activations are
    of another size at each timestep, so that all places would be normalised wrongly (on tadsr-tiny
    a half at timestep 1 beside one at 900 loses its colours).
    """

    maps: tuple[TimestepMap, ...]
    """One per image."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where the networks run."""

    def __getitem__(self, images: Sequence[int]) -> TimestepField:
        """Return the field of some of the images."""
        return replace(self, maps=tuple(self.maps[i] for i in images))

    @property
    def knots(self) -> list[Tensor]:
        """Timesteps (B,), int64, of every run."""
        # Images with fewer knots repeat their last, with no weight.
        count = max(len(m.knots) for m in self.maps)
        knots = [[*m.knots, *[m.knots[-1]] * (count - len(m.knots))] for m in self.maps]
        return list(torch.tensor(knots, device=self.device).unbind(1))

    def mix(
        self, results: Sequence[Tensor], size: tuple[int, int], rows: tuple[int, int] | None = None
    ) -> Tensor:
        """Mix what every run gave, at each position by its timestep.

        Args:
            results: Images or parts of them, (B, C, rows, W), one per knot.
            size: Height and width of the whole images.
            rows: First row that `results` are of, and the one after the last; None for all.

        Returns:
            Like a result; of a single knot the very one.
        """
        if len(results) == 1:
            return results[0]
        rows = rows or (0, size[0])
        weights = torch.zeros(len(self.maps), len(results), rows[1] - rows[0], size[1])
        for image, timestep_map in enumerate(self.maps):
            own = timestep_map.weights(*size, rows)
            weights[image, : len(own)] = own
        weights = weights.to(self.device)
        mixed = torch.zeros_like(results[0], dtype=torch.float32)
        for number, result in enumerate(results):
            mixed.addcmul_(result.float(), weights[:, number, None])
        return mixed.to(results[0].dtype)


def run_at(
    timesteps: Tensor | TimestepField,
    run: Callable[[Tensor], Result],
    generator: torch.Generator | None = None,
) -> list[Result]:
    """Run at one timestep per image, or at every knot of maps with the same noise.

    Args:
        timesteps: One per image, (B,), int64, or maps.
        run: From timesteps (B,), int64, to a result.
        generator: What `run` samples from, or None.

    Returns:
        The results, one without maps.
    """
    if not isinstance(timesteps, TimestepField):
        return [run(timesteps)]
    state = None if generator is None else generator.get_state()
    results = []
    for knot in timesteps.knots:
        if generator is not None:
            generator.set_state(state)
        results.append(run(knot))
    return results
