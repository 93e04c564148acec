"""Resizing and padding of image tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_bicubic(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize with Pillow's bicubic filter, which blurs enough not to alias.

    Args:
        x: Float tensor (B, C, H, W), any range; float16 and bfloat16 are computed in float32.
        size: New (height, width) in px.

    Returns:
        A tensor (B, C, *size) of the same dtype, not clamped; `x` itself if the size is equal.

    Raises:
        TypeError: If `x` is not a float tensor.
        ValueError: If `x` is not (B, C, H, W) with pixels, or `size` is below 1 px.
    """
    _check_nchw(x)
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"size must be at least (1, 1) px, got {(height, width)}")
    if x.shape[-2:] == (height, width):
        return x
    wide = x if x.dtype == torch.float64 else x.float()
    resized = F.interpolate(
        wide, (height, width), mode="bicubic", antialias=True, align_corners=False
    )
    return resized.to(x.dtype)


def pad_reflect(x: Tensor, bottom: int, right: int) -> Tensor:
    """Pad below and to the right by reflection, by any amount.

    Args:
        x: Float tensor (B, C, H, W), any range.
        bottom: Rows to add, in px, 0 for none; may exceed the height.
        right: Columns to add, in px, 0 for none; may exceed the width.

    Returns:
        A tensor (B, C, H + bottom, W + right), as `numpy.pad(mode="reflect")` pads: the edge is
        not repeated, except where a side is 1 px. `x` itself if there is nothing to add.

    Raises:
        TypeError: If `x` is not a float tensor.
        ValueError: If `x` is not (B, C, H, W) with pixels, or an amount is negative.
    """
    _check_nchw(x)
    if bottom < 0 or right < 0:
        raise ValueError(f"bottom and right must be at least 0 px, got {bottom} and {right}")
    for dim, amount in ((-2, bottom), (-1, right)):
        if amount:
            side = x.shape[dim]
            period = max(2 * (side - 1), 1)
            index = torch.arange(side + amount, device=x.device) % period
            x = x.index_select(dim, torch.minimum(index, period - index))
    return x


def _check_nchw(x: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        found = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a floating-point tensor, not {found}")
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(f"x must have the shape (B, C, H, W), no side 0, got {tuple(x.shape)}")
