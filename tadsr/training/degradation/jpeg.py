"""JPEG compression of images: Pillow's codec on the CPU, the same arithmetic in torch elsewhere."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

_BLOCK_PX = 8
_MCU_PX = 16  # with 4:2:0, chroma blocks cover 16 × 16 px
_TIE = 1e-3  # of a level
_LUMA_TABLE = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55,
    14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62,
    18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
)  # fmt: skip
_CHROMA_TABLE = (
    17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99,
    24, 26, 56, 99, 99, 99, 99, 99, 47, 66, 99, 99, 99, 99, 99, 99,
    *(99,) * 32,
)  # fmt: skip


def compress_jpeg(image: Tensor, quality: float) -> Tensor:
    """Compress and decompress an image as a camera or a website would.

    Args:
        image: (3, H, W) in [0, 1]; rounded to 8 bits.
        quality: 1..100, rounded; chroma is subsampled 4:2:0.

    Returns:
        (3, H, W), float32, in [0, 1], on the image's device.
    """
    if image.device.type != "cpu":
        return simulate_jpeg(image[None], [quality])[0]
    pixels = (image * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=round(quality))
    with Image.open(buffer) as decoded:
        array = np.array(decoded)
    return torch.from_numpy(array).permute(2, 0, 1).float() / 255


@torch.no_grad()
def simulate_jpeg(images: Tensor, quality: Sequence[float] | Tensor) -> Tensor:
    """Compress and decompress images in torch, on any device, without gradients.

    The steps are libjpeg's: YCbCr, chroma 4:2:0, 8 × 8 cosine transform, quantisation, and back
    with triangle ("fancy") chroma upsampling. Entropy coding loses nothing and is left out.

    Args:
        images: (B, 3, H, W) in [0, 1]; rounded to 8 bits.
        quality: 1..100, one per image, rounded.

    Returns:
        (B, 3, H, W), float32, in [0, 1].

    Raises:
        ValueError: The shape, or the number or range of qualities is wrong.

    Source: ITU-T T.81 (JPEG), annexes A and K; JFIF 1.02 for the colours.
    """
    values = [round(float(q)) for q in quality]
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must have the shape (B, 3, H, W), got {tuple(images.shape)}")
    if len(values) != len(images) or not all(1 <= q <= 100 for q in values):
        raise ValueError(f"quality must be {len(images)} numbers in 1..100, got {values}")
    height, width = images.shape[-2:]
    rgb = (images.float() * 255).round().clamp(0, 255)
    red, green, blue = rgb.unbind(1)
    luma = (0.299 * red + 0.587 * green + 0.114 * blue).round()
    chroma_blue = (-0.168735892 * red - 0.331264108 * green + 0.5 * blue + 128).round()
    chroma_red = (0.5 * red - 0.418687589 * green - 0.081312411 * blue + 128).round()
    chroma = _halve(torch.stack([chroma_blue, chroma_red.clamp(max=255)], dim=1).clamp(max=255))

    tables = (_scaled_table(table, values, images.device) for table in (_LUMA_TABLE, _CHROMA_TABLE))
    luma_table, chroma_table = tables
    luma = _quantize(luma[:, None], luma_table, _MCU_PX)[:, 0]
    chroma = _quantize(chroma, chroma_table, _BLOCK_PX)
    # What was added to fill blocks is no neighbour to interpolate with.
    chroma = chroma[..., : (height + 1) // 2, : (width + 1) // 2]
    blue_shift, red_shift = (_double(chroma)[..., :height, :width] - 128).unbind(1)
    red = luma + (1.402 * red_shift).round()
    green = luma + (-0.344136286 * blue_shift - 0.714136286 * red_shift).round()
    blue = luma + (1.772 * blue_shift).round()
    return torch.stack([red, green, blue], dim=1).clamp(0, 255) / 255


def _scaled_table(table: Sequence[int], quality: Sequence[int], device: torch.device) -> Tensor:
    """Return the quantisation table at each quality, (B, 1, 1, 1, 8, 8), as libjpeg scales it."""
    rows = []
    for value in quality:
        scale = 5000 // value if value < 50 else 200 - 2 * value
        rows.append([min(255, max(1, (base * scale + 50) // 100)) for base in table])
    return torch.tensor(rows, dtype=torch.float32, device=device).view(-1, 1, 1, 1, 8, 8)


@functools.cache
def _cosines() -> Tensor:
    """Return the orthonormal 8-point cosine transform, (8, 8), a frequency a row."""
    rows = [
        [math.cos((2 * x + 1) * u * math.pi / 16) * math.sqrt((1 if u == 0 else 2) / 8)
         for x in range(8)]
        for u in range(8)
    ]  # fmt: skip
    return torch.tensor(rows)


def _quantize(planes: Tensor, table: Tensor, multiple: int) -> Tensor:
    """Round the planes' (B, C, H, W) cosine coefficients to multiples of the table's steps."""
    height, width = planes.shape[-2:]
    padding = (0, -width % multiple, 0, -height % multiple)
    padded = F.pad(planes - 128, padding, mode="replicate")
    batch, channels, rows, columns = padded.shape
    shape = (batch, channels, rows // _BLOCK_PX, _BLOCK_PX, columns // _BLOCK_PX, _BLOCK_PX)
    blocks = padded.view(shape).transpose(3, 4)  # [B, C, rows/8, columns/8, 8, 8]
    cosines = _cosines().to(planes.device)
    # libjpeg's transform gives eighths, so that ties are exact.
    coefficients = (cosines @ blocks @ cosines.T * 8).round() / 8
    # libjpeg rounds halves away from zero.
    steps = coefficients / table
    quantized = steps.sign() * (steps.abs() + 0.5).floor() * table
    # Halves go up, and those of float rounding with them.
    blocks = (cosines.T @ quantized @ cosines + 128.5 + _TIE).floor().clamp(0, 255)
    plane = blocks.transpose(3, 4).reshape(batch, channels, rows, columns)
    return plane[..., :height, :width]


def _halve(planes: Tensor) -> Tensor:
    """Average 2 × 2 px as libjpeg's encoder does: rounding up and down in turn by column.

    The width is brought to whole blocks first, by repeating the last pixel, not the last average.
    """
    height, width = planes.shape[-2:]
    padded = F.pad(planes, (0, -width % _MCU_PX, 0, height % 2), mode="replicate")
    sums = F.avg_pool2d(padded, 2, divisor_override=1)
    bias = 1 + torch.arange(sums.shape[-1], device=planes.device) % 2
    return ((sums + bias) / 4).floor()


def _double(planes: Tensor) -> Tensor:
    """Interpolate to twice the size with weights 3/4 and 1/4 as libjpeg's decoder does."""
    padded = F.pad(planes, (1, 1, 1, 1), mode="replicate")
    near = 3 * padded[..., 1:-1, :]
    columns = torch.stack([near + padded[..., :-2, :], near + padded[..., 2:, :]], dim=-2)
    columns = columns.flatten(-3, -2)  # [B, C, 2h, w + 2]
    near = 3 * columns[..., 1:-1]
    pairs = torch.stack([near + columns[..., :-2] + 8, near + columns[..., 2:] + 7], dim=-1)
    return (pairs.flatten(-2) / 16).floor()
