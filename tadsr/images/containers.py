"""What Pillow does not read of a PNG, AVIF or HEIC file: colours by code point, and much text."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from PIL import PngImagePlugin

from tadsr.errors import ImageReadError

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COMPRESSED = (b"zTXt", b"iTXt", b"iCCP")
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_LEAST_TEXT = 2**13
"""Bytes that a text counts for, whose own costs are as large."""
_MAX_CHUNKS = 2**18
"""As many as a PNG of two gigabytes has; each takes time."""
_LARGEST_PROFILE = 2**26
_LARGEST_META = 2**24


def open_png(path: Path) -> tuple[Path | BinaryIO, dict[str, bytes]]:
    """Find what Pillow can read of a PNG, and what it cannot.

    Pillow refuses whole files for texts and profiles beyond limits of its own, which are settings
    of the process.

    Returns:
        The file itself, or a copy in memory without what is too much; and `icc_profile` and
        `cicp` where Pillow has no eye for them.
    """
    found: dict[str, bytes] = {}
    with open(path, "rb") as file:
        if file.read(8) != _PNG_SIGNATURE:
            return path, found
        left_out = []
        total = 0
        for kind, start, length in _chunks(file):
            if kind == b"cICP" and length == 4:
                found["cicp"] = file.read(4)
            elif kind in (*_TEXTS, b"iCCP"):
                is_enough = total > PngImagePlugin.MAX_TEXT_MEMORY  # inflated, for one picture
                data = b"" if is_enough else file.read(length)
                size = 0 if is_enough else _inflated_bytes(kind, data)
                total += max(size, _LEAST_TEXT)
                is_long = kind in _COMPRESSED and size > PngImagePlugin.MAX_TEXT_CHUNK
                if is_long or total > PngImagePlugin.MAX_TEXT_MEMORY:
                    left_out.append((start - 8, start + length + 4))
                    profile = _inflate(_packed(kind, data)) if kind == b"iCCP" and size else None
                    if profile:
                        found["icc_profile"] = profile
                        total += len(profile)
        if not left_out:
            return path, found
        file.seek(0)
        data = file.read()
    starts = [0, *(stop for _, stop in left_out)]
    stops = [*(start for start, _ in left_out), len(data)]
    parts = (data[start:stop] for start, stop in zip(starts, stops, strict=True))
    return io.BytesIO(b"".join(parts)), found


def find_nclx(path: Path) -> tuple[int, int] | None:
    """Return primaries and transfer of an AVIF's or HEIC's first picture, or None."""
    with open(path, "rb") as file:
        end = file.seek(0, 2)
        place = 0
        while place + 8 <= end:
            file.seek(place)
            size, kind = struct.unpack(">I4s", file.read(8))
            head = 8
            if size == 1:
                (size,), head = struct.unpack(">Q", file.read(8)), 16
            size = size or end - place
            if kind == b"meta" and size <= _LARGEST_META:
                return _nclx_of(file.read(size - head)[4:])
            place += max(size, 8)
    return None


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Walk through a PNG's chunks, the file standing at each one's data."""
    place = 8
    for _ in range(_MAX_CHUNKS):
        file.seek(place)
        head = file.read(8)
        if len(head) < 8:
            return
        length, kind = struct.unpack(">I4s", head)
        yield kind, place + 8, length
        if kind == b"IEND":
            return
        place += length + 12
    raise ImageReadError(f"{file.name}: must have at most {_MAX_CHUNKS} chunks; save it anew")


def _packed(kind: bytes, data: bytes) -> bytes | None:
    """Return what is compressed in a chunk, or None."""
    _, _, rest = data.partition(b"\0")
    if kind != b"iTXt":
        return rest[1:]
    return rest[2:].split(b"\0", 2)[-1] if rest[:1] == b"\1" else None


def _inflated_bytes(kind: bytes, data: bytes) -> int:
    packed = _packed(kind, data) if kind in _COMPRESSED else None
    if packed is None:
        return len(data)
    try:
        return len(zlib.decompressobj().decompress(packed, PngImagePlugin.MAX_TEXT_CHUNK + 1))
    except zlib.error:
        return len(data)


def _inflate(packed: bytes | None) -> bytes | None:
    try:
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(packed or b"", _LARGEST_PROFILE)
    except zlib.error:
        return None
    return None if unpacker.unconsumed_tail else data


def _nclx_of(meta: bytes) -> tuple[int, int] | None:
    boxes = dict(_boxes(meta))
    properties = dict(_boxes(boxes.get(b"iprp", b"")))
    found = {}
    for number, (kind, body) in enumerate(_boxes(properties.get(b"ipco", b"")), 1):
        if kind == b"colr" and body[:4] == b"nclx" and len(body) >= 8:
            found[number] = struct.unpack(">HH", body[4:8])
    own = _properties_of_primary(boxes.get(b"pitm", b""), properties.get(b"ipma", b""))
    return next((found[number] for number in own if number in found), None)


def _properties_of_primary(pitm: bytes, ipma: bytes) -> list[int]:
    """Return the numbers of a HEIF file's properties that belong to its primary item."""
    if len(pitm) < 6 or len(ipma) < 8:
        return []
    (primary,) = struct.unpack(">I" if pitm[0] else ">H", pitm[4 : 8 if pitm[0] else 6])
    version, is_wide = ipma[0], ipma[3] & 1
    (count,) = struct.unpack(">I", ipma[4:8])
    place, width = 8, 2 if is_wide else 1
    for _ in range(count):
        size = 4 if version else 2
        item = int.from_bytes(ipma[place : place + size], "big")
        if place + size >= len(ipma):
            break
        num = ipma[place + size]
        place += size + 1
        raw = [ipma[place + width * n : place + width * (n + 1)] for n in range(num)]
        place += width * num
        if item == primary:
            mask = 0x7FFF if is_wide else 0x7F  # the first bit says whether it is essential
            return [int.from_bytes(one, "big") & mask for one in raw]
    return []


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    place = 0
    while place + 8 <= len(data):
        size, kind = struct.unpack(">I4s", data[place : place + 8])
        size = size or len(data) - place
        if size < 8:
            return
        yield kind, data[place + 8 : place + size]
        place += size
