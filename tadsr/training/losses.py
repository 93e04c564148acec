"""Training losses as pure functions, each per sample so that timesteps can weight them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from tadsr.schedule import NUM_TRAIN_TIMESTEPS

BLUR_STEP = 200
"""Timesteps per increment of the blur: k = 5 + 4·⌊t/200⌋, σ = 1 + t/200."""


def mse_per_sample(pred: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of each item, (B,), of tensors (B, C, H, W)."""
    return (pred - target).square().flatten(1).mean(1)


def l1_per_sample(pred: Tensor, target: Tensor) -> Tensor:
    """Return the mean absolute error of each item, (B,), of tensors (B, C, H, W)."""
    return (pred - target).abs().flatten(1).mean(1)


def gradient_l1(pred: Tensor, target: Tensor) -> Tensor:
    """Return the mean absolute error of the differences between neighbours.

    Unlike the error of the pixels themselves it weights edges and texture above flat areas.

    Args:
        pred: Restored images, (B, C, H, W), at least 2 px a side.
        target: Images to compare with, shaped as `pred`.

    Returns:
        (B,), at least 0; 0 where the images differ by a constant.
    """
    difference = pred - target
    down, right = difference.diff(dim=-2), difference.diff(dim=-1)
    return (down.abs().flatten(1).mean(1) + right.abs().flatten(1).mean(1)) / 2


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


def blur_at_timesteps(
    images: Tensor, timesteps: Tensor, *, last: int = NUM_TRAIN_TIMESTEPS - 1
) -> Tensor:
    """Blur each image by the Gaussian that the loss uses at its timestep.

    Args:
        images: Images, (B, C, H, W), larger than half the largest kernel on each side.
        timesteps: One timestep per image, (B,), int64, 0..999: kernel 5 + 4·⌊t/200⌋ px (at most
            21), σ = 1 + t/200 px.
        last: Largest timestep that may come, which sizes the kernels without a look at the device.

    Returns:
        Blurred images, shaped as `images`; reflect padding.

    Source: TADSR (arXiv 2508.16557), timestep-dependent blurred MSE.
    """
    halves = 2 + 2 * (timesteps // BLUR_STEP)
    half = 2 + 2 * (last // BLUR_STEP)
    offsets = torch.arange(-half, half + 1, device=images.device, dtype=torch.float32)
    sigmas = 1 + timesteps.float() / BLUR_STEP
    kernels = torch.exp(-0.5 * (offsets / sigmas[:, None]) ** 2)  # [B, k]
    # Smaller kernels are rows with zeros at their ends, so that one pass does for all.
    kernels = kernels * (offsets.abs() <= halves[:, None])
    return blur_with(images, kernels / kernels.sum(1, keepdim=True))


def blur_with(images: Tensor, kernels: Tensor) -> Tensor:
    """Blur each image along rows and columns by its own kernel.

    Args:
        images: Images, (B, C, H, W), each side larger than half a kernel.
        kernels: One per image, (B, k) with an odd k, each with a sum of 1.

    Returns:
        Blurred images, shaped as `images`; reflect padding.
    """
    batch, channels, height, width = images.shape
    half = kernels.shape[1] // 2
    kernels = kernels.to(images.dtype).repeat_interleave(channels, 0)  # [B·C, k]
    groups = batch * channels
    x = F.pad(images, (half, half, half, half), mode="reflect")
    x = x.reshape(1, groups, height + 2 * half, width + 2 * half)
    x = F.conv2d(x, kernels[:, None, None, :], groups=groups)
    x = F.conv2d(x, kernels[:, None, :, None], groups=groups)
    return x.view(batch, channels, height, width)


def blurred_mse(
    pred: Tensor, target: Tensor, timesteps: Tensor, *, last: int = NUM_TRAIN_TIMESTEPS - 1
) -> Tensor:
    """Return the MSE of each item after the blur of its timestep.

    Args:
        pred: Restored images, (B, 3, H, W), in [-1, 1].
        target: HQ images, shaped as `pred`.
        timesteps: One timestep per item, (B,), int64, 0..999.
        last: As of `blur_at_timesteps`.

    Returns:
        (B,), at least 0. The blur is linear, so only the difference is blurred.

    Source: TADSR (arXiv 2508.16557), timestep-dependent blurred MSE.
    """
    return blur_at_timesteps(pred - target, timesteps, last=last).square().flatten(1).mean(1)


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
