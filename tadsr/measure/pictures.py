"""Pictures as they are seen and measured: sRGB of 8 bit, over white."""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor

from tadsr.images import ImageLike, decode_image, read_image, to_uint8
from tadsr.images.color_space import to_srgb


def to_rgb8(image: ImageLike) -> np.ndarray:
    """Turn an image of any kind into sRGB, uint8 (H, W, 3), laid over white.

    Args:
        image: As for `tadsr.images.decode_image`.

    Raises:
        TypeError: As `decode_image`.
        ValueError: As `decode_image`.
    """
    decoded = decode_image(image)
    colors = to_uint8(decoded.rgb)
    if profile := decoded.kind.info.get("icc_profile"):
        colors = to_srgb(colors, profile)
    if decoded.alpha is not None:
        alpha = decoded.alpha.permute(1, 2, 0).cpu().numpy()  # [H, W, 1]
        colors = (colors * alpha + 255 * (1 - alpha)).round().astype(np.uint8)
    return np.ascontiguousarray(colors)


def to_unit(image: np.ndarray) -> Tensor:
    """Turn uint8 (H, W, 3) into (1, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 255


def read_rgb8(path: str | os.PathLike[str]) -> np.ndarray:
    """Read a file as sRGB, uint8 (H, W, 3), upright and laid over white.

    Args:
        path: The file.

    Raises:
        ImageReadError: The file cannot be read.
    """
    return to_rgb8(read_image(path))
