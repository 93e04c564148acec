"""Spectra of pictures: waves that run through them whatever they show."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

DECIBELS = 10 / math.log(10)
"""In a power's natural logarithm of 1."""
WINDOW_PX = 64
"""Side of the windows whose spectra are taken."""
_SURROUNDINGS = 7
"""Side of a frequency's surroundings, in frequencies; odd."""
UNSEEN_POWER = 1e-6
"""Power that is not seen: that of rounding to 8 bits."""


def window_powers(images: Tensor, side_px: int) -> Tensor:
    """Return the power of every frequency in windows that overlap by half.

    Args:
        images: (B, 3, H, W), each side at least `side_px`.
        side_px: Side of the windows in px, even.

    Returns:
        (B, rows, columns, side_px, side_px), of lightness without the window's mean.
    """
    light = images.float().mean(1)
    step = side_px // 2
    windows = light.unfold(1, side_px, step).unfold(2, side_px, step)
    fade = torch.hann_window(side_px, device=images.device)
    windows = (windows - windows.mean((-2, -1), keepdim=True)) * fade * fade[:, None]
    waves = torch.view_as_real(torch.fft.fft2(windows, norm="ortho"))
    return waves.square().sum(-1)


def log_spectrum(images: Tensor) -> Tensor:
    """Return the logarithm of the power of every frequency, by windows of 64 px.

    Args:
        images: (B, 3, H, W) in [-1, 1], each side at least 64 px.

    Returns:
        (64, 64), the mean over images of the logarithm of the mean over their windows.
    """
    power = window_powers(images, WINDOW_PX).mean((1, 2))
    return (power + UNSEEN_POWER).log().mean(0)


def peaks_above(spectrum: Tensor, other: Tensor) -> Tensor:
    """Return how far frequencies stand out of their surroundings, more than they do in another.

    A wave that runs through pictures, whatever they show, is such a peak.

    Args:
        spectrum: A `log_spectrum` (64, 64).
        other: One of originals.

    Returns:
        (64, 64), in logarithms of power; negative where the other stands out more.
    """
    both = torch.stack([spectrum, other])[:, None]
    padded = F.pad(both, [_SURROUNDINGS // 2] * 4, mode="circular")
    peaks = (both - F.avg_pool2d(padded, _SURROUNDINGS, 1))[:, 0]
    return peaks[0] - peaks[1]
