"""Images as bytes, as they are or with their colours fixed: never back to memory as floats."""

from __future__ import annotations

import torch
from torch import Tensor

from tadsr.color import adain_color_fix, check_pair, wavelet_color_fix
from tadsr.kernels.backends import Backend, register, run_fastest
from tadsr.kernels.group_norm import check_activations


def to_uint8_nhwc(image: Tensor, *, backend: Backend | None = None) -> Tensor:
    """Turn images in [-1, 1] into bytes, channels last.

    Args:
        image: Finite images, (B, C, H, W), in [-1, 1], clamped to it; any layout in memory.
        backend: "triton" or "reference"; None takes Triton where it can run.

    Returns:
        0..255, rounded half up, (B, H, W, C), uint8, contiguous.

    Raises:
        TypeError: `image` is not a float tensor.
        ValueError: The shape is wrong, or the chosen backend cannot run.
    """
    check_activations("image", image)
    return run_fastest(
        torch.ops.tadsr.to_uint8_nhwc, to_uint8_reference, (image,), (image,), backend
    )


def to_uint8_reference(image: Tensor) -> Tensor:
    """Compute `to_uint8_nhwc` with torch's own operations."""
    return unit_to_uint8_nhwc(to_unit(image))


def to_unit(image: Tensor) -> Tensor:
    """Bring images from [-1, 1] to [0, 1], clamped, float32."""
    return image.float().clamp(-1, 1) / 2 + 0.5


def unit_to_uint8_nhwc(image: Tensor) -> Tensor:
    """Turn float32 images (B, C, H, W) in [0, 1] into bytes (B, H, W, C)."""
    rounded = image.clamp(0, 1).mul(255).add(0.5).floor()  # half up, as image files are written
    return rounded.permute(0, 2, 3, 1).to(torch.uint8).contiguous()


def empty_bytes(image: Tensor, *_: object) -> Tensor:
    """Return bytes (B, H, W, C) without content for images (B, C, H, W)."""
    batch, channels, height, width = image.shape
    return image.new_empty((batch, height, width, channels), dtype=torch.uint8)


register(
    "to_uint8_nhwc(Tensor image) -> Tensor",
    plan="images.plan_to_uint8_nhwc",
    reference=to_uint8_reference,
    fake=empty_bytes,
)


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
    check_pair(image, reference)
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
    check_pair(image, reference)
    if levels < 1:
        raise ValueError(f"levels must be at least 1, got {levels}")
    kernel, pair = torch.ops.tadsr.wavelet_color_fix_uint8, (image, reference)
    return run_fastest(kernel, wavelet_reference, pair, (*pair, levels), backend)


def adain_reference(image: Tensor, reference: Tensor) -> Tensor:
    """Compute `adain_color_fix_uint8` with torch's own operations."""
    return unit_to_uint8_nhwc(adain_color_fix(to_unit(image), to_unit(reference)))


def wavelet_reference(image: Tensor, reference: Tensor, levels: int) -> Tensor:
    """Compute `wavelet_color_fix_uint8` with torch's own operations."""
    return unit_to_uint8_nhwc(wavelet_color_fix(to_unit(image), to_unit(reference), levels))


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
