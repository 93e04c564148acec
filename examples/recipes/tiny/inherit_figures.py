"""How far `inherit.py` is: figures of pictures that are held out."""

from __future__ import annotations

import torch
from inherit_losses import grid_pattern
from inherit_samples import to_images, to_pixels
from torch import Tensor

from tadsr.measure.metrics import detail, psnr
from tadsr.measure.perceptual import SqueezeNetDistance
from tadsr.measure.spectrum import DECIBELS, log_spectrum, peaks_above


class Figures:
    """What comes together of pictures in 8 bits, by the name of who made them."""

    def __init__(self, perceptual: SqueezeNetDistance) -> None:
        self.perceptual = perceptual
        self.found: dict[str, list[Tensor]] = {}
        self.spectra: dict[str, list[Tensor]] = {}

    def add(self, name: str, images: Tensor, originals: Tensor) -> None:
        """Take pictures (B, 3, H, W) in [-1, 1] into account, and their originals."""
        pixels = to_pixels(images)
        images = to_images(pixels)
        arrays, wanted = (x.movedim(1, -1).cpu().numpy() for x in (pixels, to_pixels(originals)))
        pairs = zip(arrays, wanted, strict=True)
        for figure, values in {
            name: self.perceptual(images, originals),
            f"PSNR {name}": torch.tensor([psnr(*pair) for pair in pairs]),
            f"detail {name}": torch.tensor([detail(array) for array in arrays]),
            f"grid dB {name}": DECIBELS * (grid_pattern(images) - grid_pattern(originals)),
        }.items():
            self.found.setdefault(figure, []).append(values)
        spectra = torch.stack([log_spectrum(images), log_spectrum(originals)])
        self.spectra.setdefault(name, []).append(spectra)

    def means(self) -> dict[str, float]:
        """Return the means, with the highest wave that runs through the pictures of a name."""
        found = {name: torch.cat(values).mean().item() for name, values in self.found.items()}
        for name, spectra in self.spectra.items():
            above = peaks_above(*torch.stack(spectra).mean(0)).max()
            found[f"waves dB {name}"] = DECIBELS * above.item()
        return found
