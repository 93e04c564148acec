"""What of an image can be seen: colours under alpha 0 cannot, and equal channels are grey."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
