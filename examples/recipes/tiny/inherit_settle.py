"""The last stage of `inherit.py`: mend what is wrong without losing what has been learned."""

from __future__ import annotations

import copy

import torch
from inherit_losses import (
    BLOCK_PATTERN,
    GRID_FREQUENCY,
    block_pattern,
    detail_error,
    fitted,
    grid_pattern,
    wave_error,
)
from inherit_networks import SCALE, Setting
from inherit_samples import KINDS, chosen, to_images, to_pixels
from inherit_stages import GRID, WAVES, Stage, judged_figures
from torch import Tensor, nn

from tadsr.images import resize_bicubic
from tadsr.training.data import upsample_lq
from tadsr.training.losses import chroma_mse, l1_per_sample, mse_per_sample

KEPT_FROM = 100
"""Timestep from which nothing but `KEPT` and `NEARER` counts, apart from what no picture may have;
at 0 errors of pixels alone do."""
SQUARED, CHROMA = 240.0, 20.0
"""Weights of the errors of pixels, which end at `KEPT_FROM`."""
DAMPING = {"usual": 0.15, "camera": 0.9, "saved": 0.15}
"""Weight at timestep 0, as a part of the squared error's, of the squared distance from the enlarged
LQ image, which holds results back; for all but a camera's pictures from that of a good LQ image,
or noise and blocks would be held on to as well."""
KEPT = {"l1": 8.0, "distance": 4.0, "detail": 1.0}
"""Weights of what keeps pictures near their examples."""
STRONGEST = {"usual": 1.4, "camera": 1.1, "saved": 1.4}
"""What fine structure of examples is multiplied by at the most, where the original has more.
More takes a camera's pictures away from the originals, and brings others closer."""
NEARER = {"usual": 3.0, "camera": 8.0, "saved": 4.0}
"""Weight of the perceptual distance from the original beside it."""
BLOCKS = 32.0
"""Weight of what is left of JPEG's blocks and, in all pictures, of the latents' grid."""
_REMEMBERED = 0.995
"""Share of the mean of what is left of them that a step leaves as it was; of few steps it is
chance."""


class SettleStage(Stage):
    """Come nearer to the originals by what has little chance in it, and so by small batches.

    From `KEPT_FROM` on the example is what the student drew when the stage began, of a JPEG what it
    drew of the same picture before that was saved, with its fine structure fitted to the original's
    place by place. No adversary takes part.
    """

    name = "settle"
    needs = ("hq", "lq", "kinds")

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.start = copy.deepcopy(setting.student).requires_grad_(False)
        # Of the faithful end and of the vivid one.
        self.excess = torch.zeros(2, *BLOCK_PATTERN, device=setting.device)
        by_kind = {"damping": DAMPING, "nearer": NEARER, "strongest": STRONGEST}
        self.weights = {
            name: torch.tensor([weights[kind] for kind in KINDS], device=setting.device)
            for name, weights in by_kind.items()
        }

    def trained(self) -> list[nn.Module]:
        """Return all."""
        return [self.setting.student]

    def step(self) -> None:
        """Learn from `batch`."""
        self._forget_gradients()
        hq, lq, timesteps = (self.batch[name] for name in ("hq", "lq", "timesteps"))
        kinds = self.batch["kinds"]
        of_kind = {name: kinds == number for number, name in enumerate(KINDS)}
        image = self.setting.restored(lq, timesteps).image
        good = good_input(hq)
        kept = (timesteps / KEPT_FROM).clamp(0, 1)

        mse = mse_per_sample(image, hq)
        held_back = mse_per_sample(image, chosen(of_kind["camera"], lq, good))
        damping = self.weights["damping"][kinds] * (1 - kept)
        faithful = SQUARED * (mse + damping * held_back) + CHROMA * chroma_mse(image, hq)
        pattern = (grid_pattern(image) - grid_pattern(hq)).relu()
        waves = wave_error(image, hq)
        loss = ((1 - kept) * faithful + GRID * pattern.square()).mean() + WAVES * waves

        with torch.no_grad():
            source = chosen(of_kind["saved"], good, lq)
            example = self.setting.restored(source, timesteps, network=self.start).image
            example = fitted(example, hq, self.weights["strongest"][kinds])
        vivid, parts = self._vivid(image, example, hq, kinds)
        loss = loss + (kept * vivid).mean()

        is_vivid = timesteps >= KEPT_FROM
        shown = of_kind["saved"][:, None].repeat(1, BLOCK_PATTERN[1])
        shown[:, GRID_FREQUENCY] = True
        counted = torch.stack([~is_vivid, is_vivid])[..., None] * shown.float()
        excess = block_pattern(image) - block_pattern(hq)
        excess = torch.einsum("ebf,bdf->edf", counted, excess)
        count = counted.sum(1)[:, None]
        found = excess.detach() / count.clamp(min=1)
        self.excess.lerp_(found, (1 - _REMEMBERED) * count.clamp(max=1))
        # Of a single picture chance decides; what many have had, at its end, decides what must go.
        loss = loss + BLOCKS * (self.excess.relu() * excess).sum() / len(hq)
        loss.backward()
        self._learn()
        self._note(mse=mse, pattern=pattern, waves=waves, blocks=self.excess.amax(), **parts)

    def _vivid(
        self, image: Tensor, example: Tensor, hq: Tensor, kinds: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what is asked at large timesteps, and its parts, each (B,).

        Args:
            image: Of the student, (B, 3, H, W) in [-1, 1].
            example: What it is to stay near, of the same shape.
            hq: Originals, of the same shape.
            kinds: Numbers of the samples' kinds, (B,).
        """
        perceptual = self.setting.perceptual
        with torch.no_grad():
            wanted, original = (
                perceptual.features(self._shifted(images)) for images in (example, hq)
            )
        found = perceptual.features(self._shifted(image))
        other, distance = (perceptual.compare(found, f) for f in (wanted, original))
        l1 = l1_per_sample(image, example)
        detail = detail_error(image, hq, example)
        kept = KEPT["l1"] * l1 + KEPT["distance"] * other + KEPT["detail"] * detail
        parts = {"distance": distance, "other": other, "l1": l1, "detail": detail}
        return kept + self.weights["nearer"][kinds] * distance, parts

    def evaluate(self) -> dict[str, float]:
        """Return distances from the originals, PSNR, detail, the grid and the highest wave."""
        return judged_figures(self.setting)

    def state_dict(self) -> dict:
        """Return what going on needs."""
        own = {"start": self.start.state_dict(), "excess": self.excess}
        return super().state_dict() | own

    def load_state_dict(self, state: dict) -> None:
        """Go on from there."""
        super().load_state_dict(state)
        self.start.load_state_dict(state["start"])
        self.excess.copy_(state["excess"])


def good_input(hq: Tensor) -> Tensor:
    """Shrink originals (B, 3, H, W) in [-1, 1], do no other harm, and enlarge them again."""
    height, width = hq.shape[-2:]
    small = resize_bicubic(hq, (height // SCALE, width // SCALE))
    return upsample_lq(to_images(to_pixels(small)), (height, width))
