"""Colour fixes that end in bytes: the restored image never goes back to memory as floats."""

from __future__ import annotations

import torch
from torch import Tensor

from tadsr.kernels.backends import Backend, register, run_fastest
from tadsr.kernels.per_channel import check_activations
from tadsr.kernels.to_uint8 import empty_bytes, to_unit, unit_to_uint8_nhwc

VARIANCE_FLOOR = 1e-5
"""Added to variances of channels in [0, 1]."""


def adain_color_fix_uint8(
    image: Tensor, reference: Tensor, *, backend: Backend | None = None
) -> Tensor:
    """Give each channel the mean and spread of the reference, and return bytes.

    What `tadsr.color.adain_color_fix` computes in [0, 1], clamped and rounded half up.

    Args:
        image: Restored images, (B, 3, H, W), in [-1, 1], clamped to it; a float dtype; any layout
            in memory, such as a cropped view.
        reference: Images with the wanted colours, in [-1, 1], same shape, any float dtype.
        backend: "triton" or "reference"; None takes Triton where it can run.

    Returns:
        0..255, (B, H, W, 3), uint8, contiguous.

    Raises:
        TypeError: An argument is not a float tensor.
        ValueError: The shapes differ or are not (B, 3, H, W), or the backend cannot run.
    """
    _check_pair(image, reference)
    pair = (image, reference)
    return run_fastest(torch.ops.tadsr.adain_color_fix_uint8, adain_reference, pair, pair, backend)


def wavelet_color_fix_uint8(
    image: Tensor, reference: Tensor, levels: int = 5, *, backend: Backend | None = None
) -> Tensor:
    """Replace an image's lowest frequency band by that of the reference, and return bytes.

    What `tadsr.color.wavelet_color_fix` computes in [0, 1], clamped and rounded half up.

    Args:
        image: Restored images, (B, 3, H, W), in [-1, 1], clamped to it; a float dtype; any layout
            in memory, such as a cropped view.
        reference: Images with the wanted colours, in [-1, 1], same shape, any float dtype.
        levels: Number of blurs, at least 1; blur i reaches 2^i px.
        backend: "triton" or "reference"; None takes Triton where it can run.

    Returns:
        0..255, (B, H, W, 3), uint8, contiguous.

    Raises:
        TypeError: An argument is not a float tensor.
        ValueError: The shapes differ or are not (B, 3, H, W), `levels` < 1, or the backend cannot
            run.
    """
    _check_pair(image, reference)
    if levels < 1:
        raise ValueError(f"levels must be at least 1, got {levels}")
    kernel, pair = torch.ops.tadsr.wavelet_color_fix_uint8, (image, reference)
    return run_fastest(kernel, wavelet_reference, pair, (*pair, levels), backend)


def adain_reference(image: Tensor, reference: Tensor) -> Tensor:
    """Compute `adain_color_fix_uint8` with torch's own operations."""
    image, reference = to_unit(image), to_unit(reference)
    return unit_to_uint8_nhwc(match_moments(image, moments(image), moments(reference)))


def wavelet_reference(image: Tensor, reference: Tensor, levels: int) -> Tensor:
    """Compute `wavelet_color_fix_uint8` with torch's own operations."""
    return unit_to_uint8_nhwc(swap_low_band(to_unit(image), to_unit(reference), levels))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased variance of the channels of float32 images, (B, C) each."""
    # A single pixel has no unbiased variance (0 / 0); its spread is 0.
    correction = min(1, x.shape[-2] * x.shape[-1] - 1)
    variance, mean = torch.var_mean(x, dim=(-2, -1), correction=correction)
    return mean, variance


def match_moments(
    image: Tensor, moments: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]
) -> Tensor:
    """Turn channels of known mean and variance, (B, C) each, into channels of the wanted ones."""
    mean, variance = (m[..., None, None] for m in moments)  # [B, C, 1, 1]
    wanted_mean, wanted_variance = (m[..., None, None] for m in wanted)
    normalized = (image - mean) / (variance + VARIANCE_FLOOR).sqrt()
    return normalized * (wanted_variance + VARIANCE_FLOOR).sqrt() + wanted_mean


def swap_low_band(image: Tensor, reference: Tensor, levels: int) -> Tensor:
    """Replace the lowest band of float32 images (B, C, H, W) by that of the reference."""
    # The blur is linear, so image - low(image) + low(reference) needs only one low band.
    difference = reference - image
    for level in range(levels):
        difference = _blur(difference, distance_px=2**level)
    return image + difference


def _check_pair(image: Tensor, reference: Tensor) -> None:
    check_activations("image", image)
    check_activations("reference", reference)
    if image.shape != reference.shape or image.shape[1] != 3:
        raise ValueError(
            "image and reference must have one shape (B, 3, H, W), got "
            f"{tuple(image.shape)} and {tuple(reference.shape)}"
        )


def _blur(x: Tensor, distance_px: int) -> Tensor:
    # Clamped indices are replicate padding without the padded copy, at any distance.
    for dim in (-2, -1):
        last = x.shape[dim] - 1
        index = torch.arange(last + 1, device=x.device)
        before = x.index_select(dim, (index - distance_px).clamp(min=0))
        after = x.index_select(dim, (index + distance_px).clamp(max=last))
        x = before.add_(after).add_(x, alpha=2).mul_(0.25)
    return x


register(
    "adain_color_fix_uint8(Tensor image, Tensor reference) -> Tensor",
    plan="images.plan_adain",
    reference=adain_reference,
    fake=empty_bytes,
)
register(
    "wavelet_color_fix_uint8(Tensor image, Tensor reference, int levels) -> Tensor",
    plan="images.plan_wavelet",
    reference=wavelet_reference,
    fake=empty_bytes,
)
