"""Image files that are written from top to bottom, for images larger than memory."""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from tadsr.errors import ImageWriteError
from tadsr.image_io.codec import DecodedImage, encode_image, kept_metadata
from tadsr.image_io.files import check_writable
from tadsr.whole_file import whole_file

STREAMED_SUFFIXES = (".png", ".tif", ".tiff")
"""What `write_strips` can write."""

_TIFF_TILE_PX = 256
_ZLIB_LEVEL = 4
_INCH_METRES = 0.0254
_PNG_COLOR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}

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

    16 bit and grey stay what they were. A TIFF is tiled, and a BigTIFF where it must be; its
    EXIF is left out.

    Args:
        strips: From top to bottom without a gap.
        path: PNG or TIFF, by its suffix.
        like: The decoded image whose kind and metadata to keep.
        size: Height and width in px.
        overwrite: Whether an existing file may be replaced.

    Raises:
        ImageWriteError: The format cannot be written in strips, tifffile is missing, or writing
            fails, which leaves any existing file as it was.
    """
    path = Path(path)
    check_streamable(path)
    check_writable(path, overwrite=overwrite, size=size[::-1])
    write = _write_png if path.suffix.lower() == ".png" else _write_tiff
    has_alpha = like.alpha is not None
    channels = (1 if like.kind.is_gray else 3) + has_alpha
    dtype = np.dtype(np.uint16 if like.kind.is_16bit else np.uint8)
    metadata = kept_metadata(like.kind.info, b"GRAY" if like.kind.is_gray else b"RGB ")
    try:
        with whole_file(path) as partial, open(partial, "xb") as file:
            rows = _encode(strips, like, channels)
            write(file, rows, (*size, channels), dtype, metadata)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ImageWriteError(f"{path}: cannot be written: {error!r}") from error


def check_streamable(path: str | os.PathLike[str]) -> None:
    """Raise ImageWriteError unless `write_strips` can write such a file."""
    suffix = Path(path).suffix.lower()
    if suffix not in STREAMED_SUFFIXES:
        raise ImageWriteError(
            f"{path}: an image of this size is written in strips, which only "
            f"{', '.join(STREAMED_SUFFIXES)} can hold, got {suffix or 'no suffix'!r}"
        )
    if suffix != ".png":
        try:
            import tifffile  # noqa: F401
        except ImportError as error:
            raise ImageWriteError(
                f"{path}: large TIFF files need the library tifffile; "
                "pip install 'tadsr[large]', or write PNG"
            ) from error


def _encode(strips: Iterable[Strip], like: DecodedImage, channels: int) -> Iterator[np.ndarray]:
    """Turn strips into arrays (rows, W, channels)."""
    for _, rgb, alpha in strips:
        rows = encode_image(rgb.cpu(), None if alpha is None else alpha.cpu(), like, "np")
        if like.kind.is_gray:
            rows = rows[:, :, [0] if channels == 1 else [0, 3]]
        yield np.ascontiguousarray(rows)


def _write_png(
    file: BinaryIO,
    strips: Iterator[np.ndarray],
    shape: tuple[int, int, int],
    dtype: np.dtype,
    metadata: dict[str, Any],
) -> None:
    def chunk(kind: bytes, data: bytes) -> None:
        file.write(struct.pack(">I", len(data)) + kind + data)
        file.write(struct.pack(">I", zlib.crc32(data, zlib.crc32(kind))))

    height, width, channels = shape
    file.write(b"\x89PNG\r\n\x1a\n")
    bits = 8 * dtype.itemsize
    color_type = _PNG_COLOR_TYPES[channels]
    chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0))
    if "icc_profile" in metadata:
        chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(metadata["icc_profile"]))
    if "dpi" in metadata:
        per_metre = (round(value / _INCH_METRES) for value in metadata["dpi"])
        chunk(b"pHYs", struct.pack(">IIB", *per_metre, 1))
    if "exif" in metadata:
        chunk(b"eXIf", metadata["exif"].removeprefix(b"Exif\0\0"))
    packer = zlib.compressobj(_ZLIB_LEVEL)
    above = np.zeros((1, width * channels * dtype.itemsize), np.uint8)
    for strip in strips:
        rows = strip.astype(dtype.newbyteorder(">")).view(np.uint8).reshape(len(strip), -1)
        # Filter 2: differences from the row above, which photographs compress well with.
        filtered = np.empty((len(rows), rows.shape[1] + 1), np.uint8)
        filtered[:, 0] = 2
        filtered[:, 1:] = rows - np.concatenate([above, rows[:-1]])
        above = rows[-1:]
        if packed := packer.compress(filtered):
            chunk(b"IDAT", packed)
    chunk(b"IDAT", packer.flush())
    chunk(b"IEND", b"")


def _write_tiff(
    file: BinaryIO,
    strips: Iterator[np.ndarray],
    shape: tuple[int, int, int],
    dtype: np.dtype,
    metadata: dict[str, Any],
) -> None:
    import tifffile

    channels = shape[2]
    resolution = {}
    if "dpi" in metadata:
        resolution = {"resolution": metadata["dpi"], "resolutionunit": "INCH"}
    num_bytes = math.prod(shape) * dtype.itemsize
    with tifffile.TiffWriter(file, bigtiff=num_bytes > 2**32 - 2**25) as writer:
        writer.write(
            _tiles(strips, shape, dtype),
            shape=shape if channels > 1 else shape[:2],
            dtype=dtype,
            tile=(_TIFF_TILE_PX, _TIFF_TILE_PX),
            photometric="rgb" if channels >= 3 else "minisblack",
            planarconfig="contig" if channels > 1 else None,
            extrasamples=["unassalpha"] if channels in (2, 4) else None,
            compression="zlib",
            compressionargs={"level": _ZLIB_LEVEL},
            predictor=True,
            iccprofile=metadata.get("icc_profile"),
            metadata=None,
            **resolution,
        )


def _tiles(
    strips: Iterator[np.ndarray], shape: tuple[int, int, int], dtype: np.dtype
) -> Iterator[np.ndarray]:
    """Cut strips into tiles, row by row of tiles; the last ones are filled up with zeros."""
    height, width, channels = shape
    side = _TIFF_TILE_PX
    waiting = np.empty((0, width, channels), dtype)
    done = 0
    while done < height:
        wanted = min(side, height - done)
        while len(waiting) < wanted:
            waiting = np.concatenate([waiting, next(strips)])
        band, waiting = waiting[:wanted], waiting[wanted:]
        done += wanted
        for left in range(0, width, side):
            tile = np.zeros((side, side, channels), dtype)
            part = band[:, left : left + side]
            tile[: part.shape[0], : part.shape[1]] = part
            yield tile if channels > 1 else tile[..., 0]
