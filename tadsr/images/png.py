"""PNG and animated PNG, written as the rows come."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from typing import Any, BinaryIO

import numpy as np

from tadsr.images.metadata import iptc_resource

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_ZLIB_LEVEL = 4
_INCH_METRES = 0.0254
_COLOR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}
_KEYWORD_BYTES = 79
_LARGEST_UINT16 = 65535


class PngWriter:
    """Writes one PNG file from top to bottom.

    Args:
        shape: Height, width and channels (1..4).
    """

    def __init__(
        self,
        file: BinaryIO,
        shape: tuple[int, int, int],
        dtype: np.dtype,
        metadata: Mapping[str, Any],
    ) -> None:
        self._file, self._shape, self._dtype = file, shape, dtype
        self._num_fragments = 0
        height, width, channels = shape
        file.write(_SIGNATURE)
        bits, color_type = 8 * dtype.itemsize, _COLOR_TYPES[channels]
        self._chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0))
        for kind, data in metadata_chunks(metadata):
            self._chunk(kind, data)

    def write_image(self, strips: Iterable[np.ndarray]) -> None:
        """Write the only image, strips (rows, W, C) from top to bottom, and close the PNG."""
        for packed in self._packed(strips):
            self._chunk(b"IDAT", packed)
        self._chunk(b"IEND", b"")

    def write_frames(
        self, frames: Iterable[np.ndarray], durations_ms: Iterable[float], num_plays: int
    ) -> None:
        """Write frames (H, W, C) of an animation, each whole, and close the PNG."""
        height, width, _ = self._shape
        control = self._file.tell()
        self._chunk(b"acTL", bytes(8))
        count = 0
        for frame, duration in zip(frames, durations_ms, strict=True):
            delay = Fraction(duration / 1000).limit_denominator(_LARGEST_UINT16)
            ticks = min(delay.numerator, _LARGEST_UINT16)
            place = struct.pack(">IIII", width, height, 0, 0)
            # Dispose 0, blend 0: each frame replaces all of the one before.
            timing = struct.pack(">HHBB", ticks, delay.denominator, 0, 0)
            self._chunk(b"fcTL", self._next_number() + place + timing)
            for packed in self._packed([frame]):
                if count == 0:
                    self._chunk(b"IDAT", packed)
                else:
                    self._chunk(b"fdAT", self._next_number() + packed)
            count += 1
        self._chunk(b"IEND", b"")
        end = self._file.tell()
        self._file.seek(control)
        self._chunk(b"acTL", struct.pack(">II", count, num_plays))
        self._file.seek(end)

    def _next_number(self) -> bytes:
        self._num_fragments += 1
        return struct.pack(">I", self._num_fragments - 1)

    def _packed(self, strips: Iterable[np.ndarray]) -> Iterator[bytes]:
        """Filter and compress rows."""
        _, width, channels = self._shape
        packer = zlib.compressobj(_ZLIB_LEVEL)
        above = np.zeros((1, width * channels * self._dtype.itemsize), np.uint8)
        for strip in strips:
            rows = strip.astype(self._dtype.newbyteorder(">")).view(np.uint8)
            rows = rows.reshape(len(strip), -1)
            # Filter 2: differences from the row above, which photographs compress well with.
            filtered = np.empty((len(rows), rows.shape[1] + 1), np.uint8)
            filtered[:, 0] = 2
            filtered[:, 1:] = rows - np.concatenate([above, rows[:-1]])
            above = rows[-1:]
            if packed := packer.compress(filtered):
                yield packed
        yield packer.flush()

    def _chunk(self, kind: bytes, data: bytes) -> None:
        self._file.write(struct.pack(">I", len(data)) + kind + data)
        self._file.write(struct.pack(">I", zlib.crc32(data, zlib.crc32(kind))))


def metadata_chunks(metadata: Mapping[str, Any]) -> Iterator[tuple[bytes, bytes]]:
    """Turn metadata into the chunks that stand before a PNG's pixels."""
    if "cicp" in metadata:
        yield b"cICP", metadata["cicp"]
    if "icc_profile" in metadata:
        yield b"iCCP", b"ICC Profile\0\0" + zlib.compress(metadata["icc_profile"])
    if "dpi" in metadata:
        per_metre = (round(value / _INCH_METRES) for value in metadata["dpi"])
        yield b"pHYs", struct.pack(">IIB", *per_metre, 1)
    if "exif" in metadata:
        yield b"eXIf", metadata["exif"].removeprefix(b"Exif\0\0")
    if "xmp" in metadata:
        yield b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + metadata["xmp"]
    texts = dict(metadata.get("text", {}))
    if "comment" in metadata:
        texts.setdefault("Comment", metadata["comment"].decode("utf-8", "replace"))
    if "iptc" in metadata:
        data = iptc_resource(metadata["iptc"])
        texts["Raw profile type iptc"] = f"\niptc\n{len(data):8}\n{data.hex()}\n"
    for keyword, text in texts.items():
        name = keyword.encode("latin-1", "replace")[:_KEYWORD_BYTES] or b"Comment"
        if text.isascii() and not getattr(text, "lang", None):
            yield b"tEXt", name + b"\0" + text.encode()
            continue
        told = (getattr(text, each, None) or "" for each in ("lang", "tkey"))
        language, translated = (each.encode() if isinstance(each, str) else each for each in told)
        yield b"iTXt", b"\0".join([name, b"\0", language, translated, text.encode()])
