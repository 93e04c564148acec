"""The decoder's image as bytes, ready for an encoder of image files."""

from __future__ import annotations

import torch
from torch import Tensor

from tadsr.kernels.backends import Backend, register, run_fastest
from tadsr.kernels.per_channel import check_activations


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
    return run_fastest(torch.ops.tadsr.to_uint8_nhwc, reference, (image,), (image,), backend)


def reference(image: Tensor) -> Tensor:
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
    reference=reference,
    fake=empty_bytes,
)
