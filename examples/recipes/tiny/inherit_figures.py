"""How far `inherit.py` is: figures of pictures that are held out."""

from __future__ import annotations

import numpy as np
import torch
from inherit_losses import grid_pattern
from inherit_samples import to_images, to_pixels
from torch import Tensor

from tadsr.measure.metrics import detail, psnr
from tadsr.measure.perceptual import SqueezeNetDistance
from tadsr.measure.spectrum import DECIBELS, log_spectrum, peaks_above


class Figures:
    """Means over pictures in 8 bits, by the name of who made them."""

    def __init__(self, perceptual: SqueezeNetDistance) -> None:
        self.perceptual = perceptual
        self.found: dict[str, list[Tensor]] = {}
        self.spectra: dict[str, list[Tensor]] = {}
        self.original_spectra: list[Tensor] = []

    def add(self, results: dict[str, Tensor], originals: Tensor) -> None:
        """Take a batch into account.

        Args:
            results: Pictures (B, 3, H, W) in [-1, 1] by name; the same names every time.
            originals: Of the same shape.
        """
        wanted = _arrays(to_pixels(originals))
        pattern = grid_pattern(originals)
        self.original_spectra.append(log_spectrum(originals))
        for name, images in results.items():
            pixels = to_pixels(images)
            images, arrays = to_images(pixels), _arrays(pixels)
            pairs = zip(arrays, wanted, strict=True)
            for figure, values in {
                name: self.perceptual(images, originals),
                f"PSNR {name}": torch.tensor([psnr(*pair) for pair in pairs]),
                f"detail {name}": torch.tensor([detail(array) for array in arrays]),
                f"grid dB {name}": DECIBELS * (grid_pattern(images) - pattern),
            }.items():
                self.found.setdefault(figure, []).append(values)
            self.spectra.setdefault(name, []).append(log_spectrum(images))

    def means(self) -> dict[str, float]:
        """Return the means, and of the mean spectrum how far the highest wave stands out."""
        found = {name: torch.cat(values).mean().item() for name, values in self.found.items()}
        original = torch.stack(self.original_spectra).mean(0)
        for name, spectra in self.spectra.items():
            above = peaks_above(torch.stack(spectra).mean(0), original).max()
            found[f"waves dB {name}"] = DECIBELS * above.item()
        return found


def _arrays(pixels: Tensor) -> np.ndarray:
    """Return uint8 (B, 3, H, W) as (B, H, W, 3)."""
    return pixels.movedim(1, -1).cpu().numpy()
