"""Tiled TIFF of 8 bit, 16 bit or float, written as the rows come, with EXIF."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
import tifffile

from tadsr.images.metadata import STORAGE_TAGS

_TILE_PX = 256
_ZLIB_LEVEL = 4
_XMP_TAG, _IPTC_TAG = 700, 33723
# What a directory, by its own tag, may lead to: EXIF and GPS, and EXIF to interoperability.
_CHILDREN = {0: (34665, 34853), 34665: (40965,)}
_DIRECTORY_TAGS = (34665, 34853, 40965)
_SKIPPED_TAGS = {282, 283, 296} | STORAGE_TAGS
_BYTE, _LONG, _UNDEFINED, _LONG8 = 1, 4, 7, 16
# Bytes of a number and numbers of a value, by type.
_TYPES = {1: (1, 1), 2: (1, 1), 3: (2, 1), 4: (4, 1), 5: (4, 2), 6: (1, 1), 7: (1, 1)}
_TYPES |= {8: (2, 1), 9: (4, 1), 10: (4, 2), 11: (4, 1), 12: (8, 1), 13: (4, 1)}
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
        strips: (rows, W, C) from top to bottom without a gap.
        shape: Height, width and channels (1..4).
    """
    channels = shape[2]
    resolution = {}
    if "dpi" in metadata:
        resolution = {"resolution": metadata["dpi"], "resolutionunit": "INCH"}
    is_big = math.prod(shape) * dtype.itemsize > 2**32 - _ROOM_FOR_TAGS
    with tifffile.TiffWriter(file, bigtiff=is_big) as writer:
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
            **resolution,
        )
    attach_metadata(file, metadata)


def attach_metadata(file: BinaryIO, metadata: Mapping[str, Any]) -> None:
    """Give a TIFF its EXIF, with GPS, its XMP and its IPTC.

    A new directory with the old one's tags and these is put at the end of the file.
    """
    exif = metadata.get("exif", b"").removeprefix(b"Exif\0\0")
    blocks = {_XMP_TAG: metadata.get("xmp"), _IPTC_TAG: metadata.get("iptc")}
    if not exif and not any(blocks.values()):
        return
    file.flush()
    file.seek(0)
    header = file.read(16)
    order = _byte_order(header)
    is_big = struct.unpack(order + "H", header[2:4])[0] == _BIG_MAGIC
    pointer, place = (8, order + "Q") if is_big else (4, order + "I")
    (offset,) = struct.unpack_from(place, header, pointer)
    file.seek(offset)
    (count,) = struct.unpack(order + ("Q" if is_big else "H"), file.read(8 if is_big else 2))
    rows = [file.read(20 if is_big else 12) for _ in range(count)]
    known = {struct.unpack(order + "H", row[:2])[0]: row for row in rows}
    added = {}
    if exif:
        try:
            (first,) = struct.unpack_from(_byte_order(exif) + "I", exif, 4)
            added = _copied(file, exif, first, order, is_big)
        except struct.error:  # damaged EXIF says nothing against the pixels
            added = {}
        added = {tag: row for tag, row in added.items() if tag not in _SKIPPED_TAGS}
    for tag, data in blocks.items():
        if data:
            kind = _BYTE if tag == _XMP_TAG else _UNDEFINED
            added[tag] = _row(file, tag, kind, len(data), data, order, is_big)
    directory = _append(file, _packed(added | known, order, is_big))
    file.seek(pointer)
    file.write(struct.pack(place, directory))
    file.seek(0, 2)


def _byte_order(data: bytes) -> str:
    return ">" if data[:2] == b"MM" else "<"


def _copied(
    file: BinaryIO, exif: bytes, offset: int, order: str, is_big: bool, parent: int = 0
) -> dict[int, bytes]:
    """Copy a directory's values to the end of a file; return its rows, which point there."""
    own = _byte_order(exif)
    rows = {}
    (num_entries,) = struct.unpack_from(own + "H", exif, offset)
    for number in range(num_entries):
        entry = offset + 2 + 12 * number
        tag, kind, count = struct.unpack_from(own + "HHI", exif, entry)
        is_misplaced = tag in _DIRECTORY_TAGS and tag not in _CHILDREN.get(parent, ())
        if kind not in _TYPES or is_misplaced:
            continue
        unit, num_units = _TYPES[kind]
        start, size = entry + 8, count * num_units * unit
        if size > 4:
            (start,) = struct.unpack_from(own + "I", exif, start)
        value = exif[start : start + size]
        if len(value) < size:
            continue
        if tag in _DIRECTORY_TAGS:
            (child,) = struct.unpack(own + "I", value)
            inner = _packed(_copied(file, exif, child, order, is_big, tag), order, is_big)
            kind = _LONG8 if is_big else _LONG
            value = struct.pack(order + ("Q" if is_big else "I"), _append(file, inner))
        elif own != order:
            value = np.frombuffer(value, f"u{unit}").byteswap().tobytes()
        rows[tag] = _row(file, tag, kind, count, value, order, is_big)
    return rows


def _row(
    file: BinaryIO, tag: int, kind: int, count: int, value: bytes, order: str, is_big: bool
) -> bytes:
    """Return a directory's row; a value that does not fit goes to the end of the file."""
    room, place = (8, "Q") if is_big else (4, "I")
    if len(value) > room:
        value = struct.pack(order + place, _append(file, value))
    return struct.pack(order + "HH" + place, tag, kind, count) + value.ljust(room, b"\0")


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
