"""Pillow's bicubic resize on whatever device the image is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tadsr.kernels.per_channel import check_activations


def resize_bicubic_like_pillow(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize with Pillow's bicubic filter, which blurs enough not to alias.

    The equal of `tadsr.image_io.resize_bicubic`, on any device.

    Args:
        x: Images, (B, C, H, W), any float dtype and range; computed in float32.
        size: New (height, width) in px, at least 1.

    Returns:
        Images (B, C, *size) of x's dtype, not clamped; `x` itself if the size is equal.

    Raises:
        TypeError: `x` is not a float tensor.
        ValueError: `x` is not (B, C, H, W) with pixels, or `size` is below 1 px.
    """
    check_activations("x", x)
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"size must be at least (1, 1) px, got {(height, width)}")
    if x.shape[-2:] == (height, width):
        return x
    wide = x if x.dtype == torch.float64 else x.float()
    options = {"mode": "bicubic", "antialias": True, "align_corners": False}
    if 1 not in (wide.shape[-1], width):
        return F.interpolate(wide, (height, width), **options).to(x.dtype)
    # torch 2.13 enlarges a single column wrongly, so columns are resized as rows.
    across = F.interpolate(wide, (wide.shape[-2], width), **options)
    across = F.interpolate(across.mT.contiguous(), (width, height), **options)
    return across.mT.contiguous().to(x.dtype)
