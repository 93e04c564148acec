"""Training losses as pure functions, each per sample so that timesteps can weight them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLUR_STEP = 200
"""Timesteps per increment of the blur: k = 5 + 4·⌊t/200⌋, σ = 1 + t/200."""


def mse_per_sample(pred: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of each item, (B,), of tensors (B, C, H, W)."""
    return (pred - target).square().flatten(1).mean(1)


def chroma_mse(pred: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of the colour differences R−G and B−G of each item.

    Colours vary far less than brightness in photographs, so that a network trained from scratch
    learns them last; this makes them count.

    Args:
        pred: Restored images, (B, 3, H, W), in [-1, 1].
        target: HQ images, shaped as `pred`.

    Returns:
        (B,), at least 0; 0 where the images differ in brightness alone.
    """
    difference = pred - target
    return (difference[:, 0::2] - difference[:, 1:2]).square().flatten(1).mean(1)


def blur_at_timestep(image: Tensor, timestep: int) -> Tensor:
    """Blur images by the Gaussian that the loss uses at a timestep.

    Args:
        image: Images, (B, C, H, W), larger than half the kernel (at most 10 px) on each side.
        timestep: 0..999; kernel 5 + 4·⌊t/200⌋ px, σ = 1 + t/200 px.

    Returns:
        Blurred images, shaped as `image`; reflect padding.

    Source: TADSR (arXiv 2508.16557), timestep-dependent blurred MSE.
    """
    size = 5 + 4 * (timestep // BLUR_STEP)
    sigma = 1 + timestep / BLUR_STEP
    half = size // 2
    offsets = torch.arange(-half, half + 1, device=image.device, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(image.dtype)
    channels = image.shape[1]
    x = F.pad(image, (half, half, half, half), mode="reflect")
    x = F.conv2d(x, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, size), groups=channels)
    return F.conv2d(x, kernel.view(1, 1, -1, 1).expand(channels, 1, size, 1), groups=channels)


def blurred_mse(pred: Tensor, target: Tensor, timesteps: Tensor) -> Tensor:
    """Return the MSE of each item after the blur of its timestep.

    Args:
        pred: Restored images, (B, 3, H, W), in [-1, 1].
        target: HQ images, shaped as `pred`.
        timesteps: One timestep per item, (B,), int64, 0..999.

    Returns:
        (B,), at least 0. The blur is linear, so only the difference is blurred.

    Source: TADSR (arXiv 2508.16557), timestep-dependent blurred MSE.
    """
    difference = pred - target
    blurred = [blur_at_timestep(difference[i : i + 1], t) for i, t in enumerate(timesteps.tolist())]
    return torch.cat(blurred).square().flatten(1).mean(1)
