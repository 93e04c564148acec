"""Colour fixes: give a restored image the colours of the image it came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

VARIANCE_FLOOR = 1e-5
"""Added to variances of channels in [0, 1]."""


def adain_color_fix(image: Tensor, reference: Tensor, weights: Tensor | None = None) -> Tensor:
    """Give each channel of an image the mean and spread of the reference.

    Args:
        image: Restored image (B, 3, H, W), any float dtype and any range.
        reference: Image with the wanted colours, same shape and range as `image`.
        weights: What each pixel counts for in mean and spread, (B, 1, H, W), at least 0, such as
            its alpha; None for all alike.

    Returns:
        A tensor like `image`; computed in float32, not clamped.

    Raises:
        TypeError: If an argument is not a floating-point tensor.
        ValueError: If the shapes differ, are not (B, 3, H, W) or hold no pixel.
    """
    check_pair(image, reference)
    return match_moments(image, _moments(image, weights), _moments(reference, weights))


def match_moments(
    image: Tensor, moments: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]
) -> Tensor:
    """Turn channels of known mean and spread into channels of the wanted ones.

    Args:
        image: Image, or a part of one, (B, 3, H, W), any float dtype.
        moments: Mean and unbiased variance of the whole image's channels, (B, 3) each.
        wanted: Those of the reference.

    Returns:
        A tensor like `image`; computed in float32, not clamped.
    """
    mean, variance = (m.float()[..., None, None] for m in moments)  # [B, 3, 1, 1]
    wanted_mean, wanted_variance = (m.float()[..., None, None] for m in wanted)
    normalized = (image.float() - mean) / (variance + VARIANCE_FLOOR).sqrt()
    fixed = normalized * (wanted_variance + VARIANCE_FLOOR).sqrt() + wanted_mean
    return fixed.to(image.dtype)


def wavelet_reach_px(levels: int = 5) -> int:
    """Return how far a pixel of `wavelet_color_fix` looks in each direction, in px."""
    return 2**levels - 1


def wavelet_color_fix(image: Tensor, reference: Tensor, levels: int = 5) -> Tensor:
    """Replace an image's lowest frequency band by that of the reference.

    The low band is what `levels` blurs leave, blur i being [1, 2, 1] / 4 in each direction with
    its taps 2^i px apart and replicated edges.

    Args:
        image: Restored image (B, 3, H, W), any float dtype and any range.
        reference: Image with the wanted colours, same shape and range as `image`.
        levels: Number of blurs, at least 1; each doubles the size of what counts as detail.

    Returns:
        A tensor like `image`; computed in float32, not clamped.

    Raises:
        TypeError: If an argument is not a floating-point tensor or `levels` is not an int.
        ValueError: If the shapes differ, are not (B, 3, H, W) or hold no pixel, or `levels` < 1.
    """
    check_pair(image, reference)
    if isinstance(levels, bool) or not isinstance(levels, int):
        raise TypeError(f"levels must be an int, not {type(levels).__name__}")
    if levels < 1:
        raise ValueError(f"levels must be at least 1, got {levels}")
    # The blur is linear, so image - low(image) + low(reference) needs only one low band.
    difference = reference.float() - image.float()
    for level in range(levels):
        difference = _blur(difference, distance_px=2**level)
    return (image.float() + difference).to(image.dtype)


def no_color_fix(image: Tensor, reference: Tensor) -> Tensor:
    """Return the image as it is; the neutral colour fix.

    Args:
        image: Restored image (B, 3, H, W).
        reference: Not used.

    Returns:
        `image` itself.
    """
    return image


COLOR_FIXES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "adain": adain_color_fix,
    "wavelet": wavelet_color_fix,
    "none": no_color_fix,
}


def check_pair(image: Tensor, reference: Tensor) -> None:
    """Check that two images are float tensors of one shape (B, 3, H, W)."""
    for name, value in (("image", image), ("reference", reference)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            found = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a floating-point tensor, not {found}")
        if value.ndim != 4 or value.shape[1] != 3 or value.numel() == 0:
            raise ValueError(
                f"{name} must have the shape (B, 3, H, W), no side 0, got {tuple(value.shape)}"
            )
    if image.shape != reference.shape:
        raise ValueError(
            f"image and reference must have one shape, got {tuple(image.shape)} and "
            f"{tuple(reference.shape)}; resize the reference first"
        )


def _moments(x: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if weights is not None:
        count = weights.sum((-2, -1))  # [B, 1]
        mean = (x.float() * weights).sum((-2, -1)) / count.clamp(min=1)
        spread = ((x.float() - mean[..., None, None]).square() * weights).sum((-2, -1))
        return mean, spread / (count - 1).clamp(min=1)
    # A single pixel has no unbiased variance (0 / 0); its spread is 0.
    correction = min(1, x.shape[-2] * x.shape[-1] - 1)
    variance, mean = torch.var_mean(x.float(), dim=(-2, -1), correction=correction)
    return mean, variance


def _blur(x: Tensor, distance_px: int) -> Tensor:
    # Clamped indices are replicate padding without the padded copy, at any distance.
    for dim in (-2, -1):
        last = x.shape[dim] - 1
        index = torch.arange(last + 1, device=x.device)
        before = x.index_select(dim, (index - distance_px).clamp(min=0))
        after = x.index_select(dim, (index + distance_px).clamp(max=last))
        x = before.add_(after).add_(x, alpha=2).mul_(0.25)
    return x
