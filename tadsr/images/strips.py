"""Image files that are written from top to bottom, for images larger than memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

from tadsr.errors import ImageWriteError
from tadsr.images.decoding import DecodedImage
from tadsr.images.encoding import encode_image
from tadsr.images.files import check_writable, open_whole
from tadsr.images.metadata import kept_metadata
from tadsr.images.png import PngWriter

STREAMED_SUFFIXES = (".png", ".tif", ".tiff")
"""What `write_strips` can write."""

Strip = tuple[int, Tensor, Tensor | None]
"""First row, rgb (3, rows, W) in [0, 1], alpha (1, rows, W) or None."""


def write_strips(
    strips: Iterable[Strip],
    path: str | os.PathLike[str],
    *,
    like: DecodedImage,
    size: tuple[int, int],
    overwrite: bool = True,
) -> None:
    """Write an image as its strips come, whole or not at all.

    16 bit and grey stay what they were, and float becomes 16 bit. A TIFF is tiled, and a BigTIFF
    where it must be.
    """
    path = Path(path)
    check_streamable(path)
    check_writable(path, overwrite=overwrite, size=size[::-1])
    has_alpha = like.alpha is not None
    channels = (1 if like.kind.is_gray else 3) + has_alpha
    dtype = np.dtype(np.uint16 if like.kind.is_16bit else np.uint8)
    metadata = kept_metadata(like.kind.info, b"GRAY" if like.kind.is_gray else b"RGB ")
    rows = _encode(strips, like, channels)
    with open_whole(path) as file:
        if path.suffix.lower() == ".png":
            PngWriter(file, (*size, channels), dtype, metadata).write_image(rows)
        else:
            from tadsr.images.tiff import write_tiff

            write_tiff(file, rows, (*size, channels), dtype, metadata)


def check_streamable(path: str | os.PathLike[str]) -> None:
    """Raise ImageWriteError unless `write_strips` can write such a file."""
    suffix = Path(path).suffix.lower()
    if suffix not in STREAMED_SUFFIXES:
        raise ImageWriteError(
            f"{path}: an image of this size is written in strips, which only "
            f"{', '.join(STREAMED_SUFFIXES)} can hold, got {suffix or 'no suffix'!r}"
        )


def _encode(strips: Iterable[Strip], like: DecodedImage, channels: int) -> Iterator[np.ndarray]:
    """Turn strips into arrays (rows, W, channels)."""
    for _, rgb, alpha in strips:
        rows = encode_image(rgb.cpu(), None if alpha is None else alpha.cpu(), like, "np")
        if like.kind.is_gray:
            rows = rows[:, :, [0] if channels == 1 else [0, 3]]
        yield np.ascontiguousarray(rows)
