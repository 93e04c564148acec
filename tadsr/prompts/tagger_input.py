"""What the published tagger is shown of a picture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from PIL.Image import Resampling
from torch import Tensor

TaggerView = Literal["enlarged", "whole"]
"""What a tagger sees: the picture as TADSR enlarges it, or reduced as RAM's own transform does."""
TAGGER_VIEWS: tuple[TaggerView, ...] = get_args(TaggerView)

_SCALE = 4
_SMALLEST_SIDE_PX = 128
_MULTIPLE_PX = 8
_BAND_PX = 256  # rows of the input that are enlarged at a time
_BICUBIC_REACH_PX, _LANCZOS_REACH_PX = 2, 4  # to either side
_IMAGENET_MEAN = torch.tensor((0.485, 0.456, 0.406))[:, None, None]
_IMAGENET_STD = torch.tensor((0.229, 0.224, 0.225))[:, None, None]


def prepare_view(image: Image.Image, side: int, view: TaggerView) -> Tensor:
    """Turn a picture into the tagger's input.

    Args:
        view: "enlarged" samples the enlarged picture, without antialiasing: what TADSR's published
            code shows it; "whole" reduces the picture as it is, antialiased: RAM's own transform.

    Returns:
        (3, side, side), normalised by ImageNet's mean and deviation.
    """
    if view == "whole":
        square = np.asarray(_resize(image, (side, side), Resampling.BILINEAR), np.float32)
    else:
        square = _sample_enlarged(image, side)
    return (torch.from_numpy(square / 255).permute(2, 0, 1) - _IMAGENET_MEAN) / _IMAGENET_STD


def _sample_enlarged(image: Image.Image, side: int) -> np.ndarray:
    """Enlarge a picture and sample it bilinearly: (side, side, 3), float32, 0..255."""
    shorter = min(image.size)
    if shorter < _SMALLEST_SIDE_PX:
        size = (length * _SMALLEST_SIDE_PX // shorter for length in image.size)
        image = _resize(image, tuple(size), Resampling.BICUBIC)
    width, height = (length * _SCALE // _MULTIPLE_PX * _MULTIPLE_PX for length in image.size)
    columns, across = _bilinear_taps(width, side)
    rows, down = _bilinear_taps(height, side)
    # Before the last reduction, if there is one, which reads some rows around each.
    full = image.height * _SCALE
    reach = 0 if height == full else _LANCZOS_REACH_PX
    around = (rows + 0.5) * (full / height) + np.arange(-reach, reach + 1)[:, None]
    read = np.unique(around.astype(np.int64).clip(0, full - 1))
    sampled = np.zeros((full, len(columns), 3), np.uint8)
    sampled[read] = np.concatenate(list(_enlarged_bands(image, width, columns, read)))
    sampled = Image.fromarray(sampled).resize((len(columns), height), Resampling.LANCZOS)
    corners = np.asarray(sampled)[rows].astype(np.float32).reshape(side, 2, side, 2, 3)
    lines = corners[:, 0] + down[:, None, None, None] * (corners[:, 1] - corners[:, 0])
    return lines[:, :, 0] + across[:, None] * (lines[:, :, 1] - lines[:, :, 0])


def _enlarged_bands(
    image: Image.Image, width: int, columns: np.ndarray, rows: np.ndarray
) -> Iterator[np.ndarray]:
    """Yield some pixels of the enlarged picture, a band at a time: it may be 16 times as large."""
    is_reduced = width != image.width * _SCALE
    for top in range(0, image.height, _BAND_PX):
        bottom = min(top + _BAND_PX, image.height)
        first = max(top - _BICUBIC_REACH_PX, 0)
        last = min(bottom + _BICUBIC_REACH_PX, image.height)
        band = image.crop((0, first, image.width, last))
        band = band.resize((image.width * _SCALE, band.height), Resampling.BICUBIC)
        if not is_reduced:
            band = Image.fromarray(np.asarray(band)[:, columns])
        box = (0, top - first, band.width, bottom - first)
        band = band.resize((band.width, (bottom - top) * _SCALE), Resampling.BICUBIC, box)
        start, end = np.searchsorted(rows, (top * _SCALE, bottom * _SCALE))
        pixels = np.asarray(band)[rows[start:end] - top * _SCALE]
        if is_reduced and len(pixels):
            reduced = Image.fromarray(pixels).resize((width, len(pixels)), Resampling.LANCZOS)
            pixels = np.asarray(reduced)[:, columns]
        yield pixels.reshape(-1, len(columns), 3)


def _resize(image: Image.Image, size: tuple[int, int], filter_: Resampling) -> Image.Image:
    """Resize to (width, height), along rows first: newer versions of Pillow choose the order."""
    return image.resize((size[0], image.height), filter_).resize(size, filter_)


def _bilinear_taps(length: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return for `count` samples of a line both neighbours, (2 · count,), and the second's weight.

    In float32 as torch's interpolation, which rounds places far from the start.
    """
    step = np.float32(length) / np.float32(count)
    places = (np.arange(count, dtype=np.float32) + np.float32(0.5)) * step - np.float32(0.5)
    places = places.clip(0)
    first = np.floor(places)
    both = np.stack([first, (first + 1).clip(max=length - 1)], axis=1).ravel()
    return both.astype(np.int64), places - first
