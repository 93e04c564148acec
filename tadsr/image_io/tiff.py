"""Tiled TIFF of 8 bit, 16 bit or float, written as the rows come, with EXIF."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
import tifffile

_TILE_PX = 256
_ZLIB_LEVEL = 4
_XMP_TAG = 700
_EXIF_TAG = 34665
_DIRECTORY_TAGS = (_EXIF_TAG, 34853, 40965)  # EXIF, GPS, interoperability
_RESOLUTION_TAGS = (282, 283, 296)
_BYTE, _LONG, _LONG8 = 1, 4, 16
# Bytes of a value, by type.
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_BIG_MAGIC = 43
_ROOM_FOR_TAGS = 2**25


def write_tiff(
    file: BinaryIO,
    strips: Iterable[np.ndarray],
    shape: tuple[int, int, int],
    dtype: np.dtype,
    metadata: Mapping[str, Any],
) -> None:
    """Write strips as a tiled TIFF, a BigTIFF where it must be.

    Args:
        file: Seekable, open for reading and writing, empty.
        strips: (rows, W, C) from top to bottom without a gap.
        shape: Height, width and channels (1..4).
        dtype: uint8, uint16 or float32.
        metadata: As of `kept_metadata`.
    """
    channels = shape[2]
    exif = metadata.get("exif", b"").removeprefix(b"Exif\0\0")
    options = {}
    if "dpi" in metadata:
        options |= {"resolution": metadata["dpi"], "resolutionunit": "INCH"}
    if "xmp" in metadata:
        options["extratags"] = [(_XMP_TAG, _BYTE, len(metadata["xmp"]), metadata["xmp"], True)]
    is_big = math.prod(shape) * dtype.itemsize > 2**32 - _ROOM_FOR_TAGS
    with tifffile.TiffWriter(file, bigtiff=is_big, byteorder=_byte_order(exif)) as writer:
        writer.write(
            _tiles(iter(strips), shape, dtype),
            shape=shape if channels > 1 else shape[:2],
            dtype=dtype,
            tile=(_TILE_PX, _TILE_PX),
            photometric="rgb" if channels >= 3 else "minisblack",
            planarconfig="contig" if channels > 1 else None,
            extrasamples=["unassalpha"] if channels in (2, 4) else None,
            compression="zlib",
            compressionargs={"level": _ZLIB_LEVEL},
            predictor=dtype.kind == "u",
            iccprofile=metadata.get("icc_profile"),
            software=False,
            metadata=None,
            **options,
        )
    if exif:
        _attach_exif(file, exif)


def _byte_order(data: bytes) -> str:
    return ">" if data[:2] == b"MM" else "<"


def _attach_exif(file: BinaryIO, exif: bytes) -> None:
    """Replace the directory of a TIFF of the same byte order by one with EXIF's tags too."""
    order = _byte_order(exif)
    file.seek(0)
    header = file.read(16)
    is_big = struct.unpack(order + "H", header[2:4])[0] == _BIG_MAGIC
    pointer = 8 if is_big else 4  # where the directory's place stands
    place = order + ("Q" if is_big else "I")
    (offset,) = struct.unpack_from(place, header, pointer)
    file.seek(offset)
    (count,) = struct.unpack(order + ("Q" if is_big else "H"), file.read(8 if is_big else 2))
    rows = [file.read(20 if is_big else 12) for _ in range(count)]
    known = {struct.unpack(order + "H", row[:2])[0]: row for row in rows}
    (first,) = struct.unpack_from(order + "I", exif, 4)
    added = _rows(file, exif, first, order, is_big)
    merged = {tag: row for tag, row in added.items() if tag not in _RESOLUTION_TAGS} | known
    directory = _append(file, _packed(merged, order, is_big))
    file.seek(pointer)
    file.write(struct.pack(place, directory))
    file.seek(0, 2)


def _rows(file: BinaryIO, exif: bytes, offset: int, order: str, is_big: bool) -> dict[int, bytes]:
    """Copy a directory's values to the end of a file; return its rows, which point there."""
    inline, place = (8, "Q") if is_big else (4, "I")
    rows = {}
    for start, tag, kind, count in _entries(exif, offset, order):
        size = count * _TYPE_BYTES[kind]
        if size > 4:
            (start,) = struct.unpack_from(order + "I", exif, start)
        value = exif[start : start + size]
        if tag in _DIRECTORY_TAGS:
            (child,) = struct.unpack(order + "I", value)
            inner = _packed(_rows(file, exif, child, order, is_big), order, is_big)
            kind, value = _LONG8 if is_big else _LONG, _append(file, inner)
            value = struct.pack(order + place, value)
        elif size > inline:
            value = struct.pack(order + place, _append(file, value))
        row = struct.pack(order + "HH" + place, tag, kind, count)
        rows[tag] = row + value.ljust(inline, b"\0")
    return rows


def _entries(exif: bytes, offset: int, order: str) -> Iterator[tuple[int, int, int, int]]:
    """Yield where the value stands, the tag, type and count of each entry of a directory."""
    (count,) = struct.unpack_from(order + "H", exif, offset)
    for number in range(count):
        entry = offset + 2 + 12 * number
        tag, kind, length = struct.unpack_from(order + "HHI", exif, entry)
        if kind in _TYPE_BYTES:
            yield entry + 8, tag, kind, length


def _packed(rows: dict[int, bytes], order: str, is_big: bool) -> bytes:
    count = struct.pack(order + ("Q" if is_big else "H"), len(rows))
    return count + b"".join(rows[tag] for tag in sorted(rows)) + bytes(8 if is_big else 4)


def _append(file: BinaryIO, data: bytes) -> int:
    """Write at an even place at the end; return the place."""
    place = file.seek(0, 2)
    if place % 2:
        place += file.write(b"\0")
    file.write(data)
    return place


def _tiles(
    strips: Iterator[np.ndarray], shape: tuple[int, int, int], dtype: np.dtype
) -> Iterator[np.ndarray]:
    """Cut strips into tiles, row by row of tiles; the last ones are filled up with zeros."""
    height, width, channels = shape
    waiting = np.empty((0, width, channels), dtype)
    done = 0
    while done < height:
        wanted = min(_TILE_PX, height - done)
        while len(waiting) < wanted:
            waiting = np.concatenate([waiting, next(strips)])
        band, waiting = waiting[:wanted], waiting[wanted:]
        done += wanted
        for left in range(0, width, _TILE_PX):
            tile = np.zeros((_TILE_PX, _TILE_PX, channels), dtype)
            part = band[:, left : left + _TILE_PX]
            tile[: part.shape[0], : part.shape[1]] = part
            yield tile if channels > 1 else tile[..., 0]
