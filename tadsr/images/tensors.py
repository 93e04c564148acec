"""Image tensors: resized, padded, and what of them can be seen."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

_LONG_SIDE = 2048
"""Sides beyond it are weighted here: torch counts positions in float32, which at thousands of px is
off by a tenth of a level at hard edges."""
_ROWS_AT_ONCE = 64


def resize_bicubic(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize with Pillow's bicubic filter, which blurs enough not to alias.

    Args:
        x: Float tensor (B, C, H, W), any range; float16 and bfloat16 are computed in float32.

    Returns:
        A tensor (B, C, *size) of the same dtype, not clamped; `x` itself if the size is equal.
    """
    _check_nchw(x)
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"size must be at least (1, 1) px, got {(height, width)}")
    if x.shape[-2:] == (height, width):
        return x
    return _interpolate(x, (height, width)).to(x.dtype)


def resize_bicubic_rows(x: Tensor, size: tuple[int, int], start: int, stop: int) -> Tensor:
    """Return some rows of `resize_bicubic`, from the few input rows that they need.

    Args:
        x: Float tensor (B, C, H, W), any range.
        start: First row of the result, 0..height − 1.

    Returns:
        Rows (B, C, stop − start, width), within rounding those of the whole.
    """
    _check_nchw(x)
    height = x.shape[-2]
    if size == (height, x.shape[-1]):
        return x[..., start:stop, :]
    ratio = height / size[0]
    # The filter widens where it shrinks; Pillow's positions and its cubic with a = −0.5.
    stretch = max(1.0, ratio)
    centers = (torch.arange(start, stop, dtype=torch.float64) + 0.5) * ratio
    first = max(0, math.floor(centers[0].item() - 2 * stretch))
    last = min(height, math.ceil(centers[-1].item() + 2 * stretch) + 1)
    positions = torch.arange(first, last, dtype=torch.float64) + 0.5
    weights = _cubic((positions - centers[:, None]) / stretch)
    weights /= weights.sum(1, keepdim=True)
    rows = _interpolate(x[..., first:last, :], (last - first, size[1]))
    # The type first: Apple's GPUs have no float64.
    weights = weights.to(rows.dtype).to(rows.device)
    return torch.matmul(weights, rows).to(x.dtype)


def _interpolate(x: Tensor, size: tuple[int, int]) -> Tensor:
    if x.device.type == "mps":  # torch 2.6 has no antialiased bicubic there
        return _interpolate(x.cpu(), size).to(x.device)
    wide = x if x.dtype == torch.float64 else x.float()
    height, width = wide.shape[-2:]
    if height != size[0] and max(height, size[0]) > _LONG_SIDE:
        starts = range(0, size[0], _ROWS_AT_ONCE)
        stops = [*starts[1:], size[0]]
        return torch.cat(list(map(partial(resize_bicubic_rows, wide, size), starts, stops)), -2)
    if width != size[1] and max(width, size[1]) > _LONG_SIDE:
        return _interpolate(wide.mT.contiguous(), size[::-1]).mT.contiguous()
    options = {"mode": "bicubic", "antialias": True, "align_corners": False}
    if 1 not in (width, size[1]):
        return F.interpolate(wide, size, **options)
    # torch 2.13 enlarges a single column wrongly, so columns are resized as rows.
    across = F.interpolate(wide, (height, size[1]), **options)
    return F.interpolate(across.mT.contiguous(), size[::-1], **options).mT.contiguous()


def _cubic(distance: Tensor) -> Tensor:
    """Weigh distances with Keys' cubic, a = −0.5."""
    d = distance.abs()
    near = (1.5 * d - 2.5) * d * d + 1
    far = ((-0.5 * d + 2.5) * d - 4) * d + 2
    return torch.where(d < 1, near, torch.where(d < 2, far, 0))


def pad_reflect(x: Tensor, bottom: int, right: int) -> Tensor:
    """Pad below and to the right by reflection, by any amount.

    Args:
        x: Float tensor (B, C, H, W), any range.

    Returns:
        A tensor (B, C, H + bottom, W + right), as `numpy.pad(mode="reflect")` pads: the edge is
        not repeated, except where a side is 1 px. `x` itself if there is nothing to add.
    """
    _check_nchw(x)
    if bottom < 0 or right < 0:
        raise ValueError(f"bottom and right must be at least 0 px, got {bottom} and {right}")
    for dim, amount in ((-2, bottom), (-1, right)):
        if amount:
            side = x.shape[dim]
            x = x.index_select(dim, reflect_index(0, side + amount, side).to(x.device))
    return x


def pad_wrap(x: Tensor, margins: tuple[int, int]) -> Tensor:
    """Pad an image that repeats by what lies beyond its edges.

    Args:
        x: (B, C, H, W), any range.
        margins: Rows to add above and below, columns to add left and right; may exceed the sides.
    """
    for dim, margin in zip((-2, -1), margins, strict=True):
        if margin:
            side = x.shape[dim]
            index = torch.arange(-margin, side + margin, device=x.device) % side
            x = x.index_select(dim, index)
    return x


def resize_wrapped(x: Tensor, size: tuple[int, int], wraps: tuple[bool, bool]) -> Tensor:
    """Resize an image that repeats, as `resize_bicubic`.

    Args:
        x: (B, C, H, W), any range.
        size: New (height, width) in px.
        wraps: Whether it repeats below, and to the right.
    """
    sides, margins, cut = x.shape[-2:], [], []
    for side, new, wrap in zip(sides, size, wraps, strict=True):
        # A margin that becomes whole px, as wide as the filter reaches.
        step = side // math.gcd(side, new)
        reach = math.ceil(2 * max(1, side / new)) + 1
        margins.append(-(-reach // step) * step if wrap else 0)
        cut.append(margins[-1] * new // side)
    padded = tuple(new + 2 * extra for new, extra in zip(size, cut, strict=True))
    resized = resize_bicubic(pad_wrap(x, tuple(margins)), padded)
    return resized[..., cut[0] : cut[0] + size[0], cut[1] : cut[1] + size[1]]


def reflect_index(start: int, stop: int, side: int) -> Tensor:
    """Return where the positions start..stop of a side padded by reflection come from."""
    period = max(2 * (side - 1), 1)
    index = torch.arange(start, stop) % period
    return torch.minimum(index, period - index)


def _check_nchw(x: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        found = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a floating-point tensor, not {found}")
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(f"x must have the shape (B, C, H, W), no side 0, got {tuple(x.shape)}")


def is_colorless(rgb: Tensor, alpha: Tensor | None) -> bool:
    """Tell whether all pixels that can be seen are grey.

    Args:
        rgb: (3, H, W).
        alpha: (1, H, W), 0 where nothing can be seen; None for an opaque image.
    """
    is_gray = (rgb[0] == rgb[1]) & (rgb[1] == rgb[2])
    return bool((is_gray if alpha is None else is_gray | (alpha[0] == 0)).all())


def spread_colors(rgb: Tensor, alpha: Tensor) -> Tensor:
    """Replace colours that cannot be seen by those nearby that can.

    What lies under alpha 0 is arbitrary, and would bleed into the picture when it is resized.

    Args:
        rgb: Float (C, H, W), any range.
        alpha: (1, H, W), 0 where nothing can be seen.
    """
    is_visible = alpha > 0
    if is_visible.all() or not is_visible.any():
        return rgb
    return _spread(rgb[None], is_visible[None].to(rgb.dtype))[0]


def _spread(colors: Tensor, weights: Tensor) -> Tensor:
    """Fill (1, C, H, W) where the weights are 0 from means over 2 × 2, 4 × 4, ... px."""
    is_visible = weights > 0
    if is_visible.all():
        return colors
    height, width = colors.shape[-2:]
    padding = (0, width % 2, 0, height % 2)
    mass = F.avg_pool2d(F.pad(weights, padding), 2)
    sums = F.avg_pool2d(F.pad(colors * weights, padding), 2)
    means = sums / torch.where(mass > 0, mass, 1)
    coarse = _spread(means, (mass > 0).to(weights.dtype))
    smooth = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)
    return torch.where(is_visible, colors, smooth[..., :height, :width])
