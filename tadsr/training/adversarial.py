"""An adversarial loss with a light discriminator of image patches."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

LEAK = 0.2
"""Slope of the leaky rectifiers below zero."""


class PatchDiscriminator(nn.Module):
    """Distinguish photographs from restorations, patch by patch.

    Source: PatchGAN (arXiv 1611.07004); spectral normalisation (arXiv 1802.05957).
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for out_channels in (width, 2 * width, 4 * width):
            conv = nn.Conv2d(channels, out_channels, 4, stride=2, padding=1)
            layers += [spectral_norm(conv), nn.LeakyReLU(LEAK)]
            channels = out_channels
        layers += [spectral_norm(nn.Conv2d(channels, channels, 3, padding=1)), nn.LeakyReLU(LEAK)]
        self.layers = nn.Sequential(*layers, spectral_norm(nn.Conv2d(channels, 1, 3, padding=1)))

    def forward(self, images: Tensor) -> Tensor:
        """Score images (B, 3, H, W) in [-1, 1]; (B, 1, H/8, W/8), large for photographs."""
        return self.layers(images)


def generator_loss(scores: Tensor) -> Tensor:
    """Return how far restorations are from passing as photographs.

    Args:
        scores: The discriminator's scores of restorations, (B, 1, h, w).

    Returns:
        (B,); falls without bound as the scores rise.

    Source: Geometric GAN (arXiv 1705.02894), hinge loss.
    """
    return -scores.flatten(1).mean(1)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return the discriminator's hinge loss.

    Args:
        real: Scores of photographs, (B, 1, h, w).

    Returns:
        (B,), at least 0; 0 where photographs score above 1 and restorations below −1.

    Source: Geometric GAN (arXiv 1705.02894), hinge loss.
    """
    return (F.relu(1 - real) + F.relu(1 + fake)).flatten(1).mean(1) / 2
