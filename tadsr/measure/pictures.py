"""Pictures as they are measured: 8 bits per colour, without alpha."""

from __future__ import annotations

import os

import numpy as np

from tadsr.images import ImageLike, decode_image, read_image


def to_rgb8(image: ImageLike) -> np.ndarray:
    """Turn an image of any kind into uint8 (H, W, 3), without its alpha.

    Args:
        image: As for `tadsr.images.decode_image`.

    Raises:
        TypeError: As `decode_image`.
        ValueError: As `decode_image`.
    """
    pixels = decode_image(image).rgb.cpu() * 255
    return pixels.round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()


def read_rgb8(path: str | os.PathLike[str]) -> np.ndarray:
    """Read a file as uint8 (H, W, 3), turned by its EXIF orientation.

    Args:
        path: The file.

    Raises:
        ImageReadError: The file cannot be read.
    """
    return to_rgb8(read_image(path))
