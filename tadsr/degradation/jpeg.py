"""Lossy compression of images: Pillow's codecs, and JPEG's arithmetic in torch for GPUs."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

_BLOCK_PX = 8
_MCU_PX = 16  # with 4:2:0, chroma blocks cover 16 × 16 px
_DCT_COLUMNS = (
    (8192, 11363, 10703, 9633, 8192, 6437, 4433, 2260),
    (8192, 9633, 4433, -2259, -8192, -11362, -10704, -6436),
    (8192, 6437, -4433, -11362, -8192, 2261, 10704, 9633),
    (8192, 2260, -10703, -6436, 8192, 9633, -4433, -11363),
)
"""Left half of the cosine transform, a column of 8 frequencies each, in 2^-13, as libjpeg has it:
its factors are rounded sums. The right half mirrors it, odd frequencies with their sign turned."""
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
    return _through_pillow(image, "JPEG", quality)


def compress_webp(image: Tensor, quality: float) -> Tensor:
    """Compress and decompress an image as lossy WebP, always on the CPU.

    Arguments and result as `compress_jpeg`.
    """
    return _through_pillow(image.cpu(), "WEBP", quality).to(image.device)


def _through_pillow(image: Tensor, file_format: str, quality: float) -> Tensor:
    pixels = (image * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, file_format, quality=round(quality))
    with Image.open(buffer) as decoded:
        array = np.array(decoded)
    return torch.from_numpy(array).permute(2, 0, 1).float() / 255


@torch.no_grad()
def simulate_jpeg(images: Tensor, quality: Sequence[float] | Tensor) -> Tensor:
    """Compress and decompress images in torch, on any device, without gradients.

    The steps are libjpeg-turbo's, in its own integers: YCbCr, chroma 4:2:0, 8 × 8 cosine transform,
    quantisation, and back with triangle ("fancy") chroma upsampling. Entropy coding loses nothing
    and is left out, so the pixels are those of Pillow where it is built on libjpeg-turbo.

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
    rgb = (images.float() * 255).round().clamp(0, 255).int()
    half = 1 << 15
    luma = _mix(rgb, (19595, 38470, 7471), half)
    # One below a half: libjpeg rounds ties of chroma down.
    chroma_blue = _mix(rgb, (-11059, -21709, 32768), (128 << 16) + half - 1)
    chroma_red = _mix(rgb, (32768, -27439, -5329), (128 << 16) + half - 1)
    chroma = _halve(torch.stack([chroma_blue, chroma_red], dim=1))

    tables = [_scaled_table(table, values, images.device) for table in (_LUMA_TABLE, _CHROMA_TABLE)]
    luma = _quantize(luma[:, None], tables[0], _MCU_PX)[:, 0]
    chroma = _quantize(chroma, tables[1], _BLOCK_PX)
    # What was added to fill blocks is no neighbour to interpolate with.
    chroma = chroma[..., : (height + 1) // 2, : (width + 1) // 2]
    chroma = _double(chroma)[..., :height, :width] - 128
    red = luma + _mix(chroma, (0, 91881), half)
    green = luma + _mix(chroma, (-22554, -46802), half)
    blue = luma + _mix(chroma, (116130, 0), half)
    return torch.stack([red, green, blue], dim=1).clamp(0, 255).float() / 255


def _mix(planes: Tensor, weights: Sequence[int], offset: int) -> Tensor:
    """Sum channels by weights in 2^-16, (B, C, H, W) to (B, H, W)."""
    return sum(w * p for w, p in zip(weights, planes.unbind(1), strict=True)).add(offset) >> 16


def _scaled_table(table: Sequence[int], quality: Sequence[int], device: torch.device) -> Tensor:
    """Return the quantisation table at each quality, (B, 1, 1, 1, 8, 8), as libjpeg scales it."""
    rows = []
    for value in quality:
        scale = 5000 // value if value < 50 else 200 - 2 * value
        rows.append([min(255, max(1, (base * scale + 50) // 100)) for base in table])
    return torch.tensor(rows, dtype=torch.int32, device=device).view(-1, 1, 1, 1, 8, 8)


def _transform(matrix: Tensor, blocks: Tensor, bits: int) -> Tensor:
    """Return matrix @ blocks in 2^-bits, rounded; few devices multiply matrices of integers."""
    product = sum(matrix[:, k, None] * blocks[..., k, None, :] for k in range(_BLOCK_PX))
    return (product + (1 << bits - 1)) >> bits


def _quantize(planes: Tensor, table: Tensor, multiple: int) -> Tensor:
    """Round the planes' (B, C, H, W) cosine coefficients to multiples of the table's steps."""
    height, width = planes.shape[-2:]
    padding = (0, -width % multiple, 0, -height % multiple)
    padded = _replicate(planes - 128, padding)
    batch, channels, rows, columns = padded.shape
    shape = (batch, channels, rows // _BLOCK_PX, _BLOCK_PX, columns // _BLOCK_PX, _BLOCK_PX)
    blocks = padded.reshape(shape).transpose(3, 4)  # [B, C, rows/8, columns/8, 8, 8]
    left = torch.tensor(_DCT_COLUMNS, dtype=torch.int32, device=planes.device).T
    signs = torch.tensor([1, -1] * 4, dtype=torch.int32, device=planes.device)[:, None]
    cosines = torch.cat([left, left.flip(1) * signs], dim=1)
    # libjpeg goes by rows first forth, by columns first back; in between it keeps two more bits.
    along = _transform(cosines, blocks.mT, 11).mT
    coefficients = _transform(cosines, along, 15)  # in eighths
    steps = torch.div(coefficients.abs() + 4 * table, 8 * table, rounding_mode="floor")
    quantized = coefficients.sign() * steps * table
    across = _transform(cosines.T, quantized, 11)
    levels = _transform(cosines.T, across.mT, 18).mT
    plane = (levels + 128).clamp(0, 255).transpose(3, 4).reshape(batch, channels, rows, columns)
    return plane[..., :height, :width]


def _replicate(planes: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
    """Repeat the edge of integer planes; levels of 8 bits are exact in float."""
    return F.pad(planes.float(), padding, mode="replicate").int()


def _halve(planes: Tensor) -> Tensor:
    """Average 2 × 2 px as libjpeg's encoder does: rounding up and down in turn by column.

    The width is brought to whole blocks first, by repeating the last pixel, not the last average.
    """
    height, width = planes.shape[-2:]
    padded = _replicate(planes, (0, -width % _MCU_PX, 0, height % 2))
    rows = padded[..., ::2, :] + padded[..., 1::2, :]
    bias = 1 + torch.arange(rows.shape[-1] // 2, dtype=torch.int32, device=planes.device) % 2
    return (rows[..., ::2] + rows[..., 1::2] + bias) >> 2


def _double(planes: Tensor) -> Tensor:
    """Interpolate to twice the size with weights 3/4 and 1/4 as libjpeg's decoder does."""
    if planes.shape[-1] <= 2:  # too narrow for libjpeg to interpolate
        return planes.repeat_interleave(2, -1).repeat_interleave(2, -2)
    padded = _replicate(planes, (1, 1, 1, 1))
    near = 3 * padded[..., 1:-1, :]
    columns = torch.stack([near + padded[..., :-2, :], near + padded[..., 2:, :]], dim=-2)
    columns = columns.flatten(-3, -2)  # [B, C, 2h, w + 2]
    near = 3 * columns[..., 1:-1]
    pairs = torch.stack([near + columns[..., :-2] + 8, near + columns[..., 2:] + 7], dim=-1)
    return pairs.flatten(-2) >> 4
