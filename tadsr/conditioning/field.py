"""The maps of a batch of images, and how their timesteps come together in one result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tadsr.conditioning.timestep_map import TimestepMap


@dataclass(frozen=True, eq=False)
class TimestepField:
    """The maps of a batch of images, as the networks take them in place of timesteps (B,).

    The networks run once for every knot of the maps, each time on the whole image with one
    timestep, and every position mixes the latents that they predict by its own timestep. Giving
    each position's timestep to one single run does not work: GroupNorm sees the whole image, and
    the UNet's activations are of another size at each timestep, so that all places would be
    normalised wrongly (on tadsr-tiny a half at timestep 1 beside one at 900 loses its colours).
    """

    maps: tuple[TimestepMap, ...]
    """One per image."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where the networks run."""
    covered: tuple[float, float] = (1.0, 1.0)
    """Shares of height and width that the image takes of what the networks see; the rest pads."""

    def __getitem__(self, images: Sequence[int]) -> TimestepField:
        """Return the field of some of the images."""
        return replace(self, maps=tuple(self.maps[i] for i in images))

    def padded(self, size: tuple[int, int], padded: tuple[int, int]) -> TimestepField:
        """Return the field for images of a (height, width) that were padded to another."""
        return replace(self, covered=(size[0] / padded[0], size[1] / padded[1]))

    def mix(self, predict: Callable[[Tensor], Tensor]) -> Tensor:
        """Run a prediction at every knot and mix the results at each position.

        Args:
            predict: From timesteps (B,), int64, to latents (B, C, h, w).

        Returns:
            Latents (B, C, h, w); of a single knot exactly those that it gives.
        """
        # Images with fewer knots repeat their last, with no weight.
        count = max(len(m.knots) for m in self.maps)
        knots = [[*m.knots, *[m.knots[-1]] * (count - len(m.knots))] for m in self.maps]
        timesteps = torch.tensor(knots, device=self.device)  # [B, knots]
        mixed = None
        for number in range(count):
            latents = predict(timesteps[:, number])
            if count == 1:
                return latents
            part = latents.float() * self._weights(number, *latents.shape[2:])
            mixed = part if mixed is None else mixed.add_(part)
        return mixed.to(latents.dtype)

    def _weights(self, number: int, height: int, width: int) -> Tensor:
        """Return what each position takes of its map's knot of that number, (B, 1, h, w)."""
        weights = [m.weights(height, width, self.covered) for m in self.maps]
        zero = torch.zeros(height, width)
        chosen = [w[number] if number < len(w) else zero for w in weights]
        return torch.stack(chosen)[:, None].to(self.device)


def predict_at(
    timesteps: Tensor | TimestepField,
    predict: Callable[[Tensor], Tensor],
    generator: torch.Generator | None = None,
) -> Tensor:
    """Run a prediction at one timestep per image, or at those of maps with the same noise.

    Args:
        timesteps: One per image, (B,), int64, or maps.
        predict: From timesteps (B,), int64, to latents (B, C, h, w).
        generator: What `predict` samples from, or None.

    Returns:
        Latents (B, C, h, w).
    """
    if not isinstance(timesteps, TimestepField):
        return predict(timesteps)
    state = None if generator is None else generator.get_state()

    def predict_anew(timesteps: Tensor) -> Tensor:
        if generator is not None:
            generator.set_state(state)
        return predict(timesteps)

    return timesteps.mix(predict_anew)
