"""JPEG compression of tensors, by Pillow's own codec."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def compress_jpeg(image: Tensor, quality: float) -> Tensor:
    """Compress and decompress an image as a camera or a website would.

    Args:
        image: (3, H, W) in [0, 1]; rounded to 8 bits.
        quality: 1..100, rounded; chroma is subsampled 4:2:0.

    Returns:
        (3, H, W), float32, in [0, 1], on the image's device.
    """
    pixels = (image * 255).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=round(quality))
    with Image.open(buffer) as decoded:
        array = np.array(decoded)
    return torch.from_numpy(array).permute(2, 0, 1).to(image.device).float() / 255
