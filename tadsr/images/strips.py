"""PNG and TIFF files, written whole or not at all as their rows come."""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from torch import Tensor

from tadsr.errors import ImageWriteError, reason_of
from tadsr.images.decoding import DecodedImage
from tadsr.images.encoding import encode_image
from tadsr.images.metadata import STORAGE_TAGS, iptc_resource, kept_metadata
from tadsr.whole_file import whole_file

STREAMED_SUFFIXES = (".png", ".tif", ".tiff")
"""What `write_strips` can write."""

Strip = tuple[int, Tensor, Tensor | None]
"""First row, rgb (3, rows, W) in [0, 1], alpha (1, rows, W) or None."""

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_ZLIB_LEVEL = 4
_INCH_METRES = 0.0254
_COLOR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}
_KEYWORD_BYTES = 79
_LARGEST_UINT16 = 65535

_TILE_PX = 256
_XMP_TAG, _IPTC_TAG = 700, 33723
_EXIF_TAG, _GPS_TAG, _INTEROP_TAG = 34665, 34853, 40965
_SKIPPED_TAGS = {282, 283, 296} | STORAGE_TAGS
_LONG8 = 16
_BIG_MAGIC = 43
_ROOM_FOR_TAGS = 2**25


def write_strips(
    strips: Iterable[Strip],
    path: str | os.PathLike[str],
    *,
    like: DecodedImage,
    size: tuple[int, int],
) -> None:
    """Write an image as its strips come, whole or not at all, to a path that has been checked.

    16 bit and grey stay what they were, and float becomes 16 bit. A TIFF is tiled, and a BigTIFF
    where it must be.
    """
    path = Path(path)
    channels = (1 if like.kind.is_gray else 3) + (like.alpha is not None)
    dtype = np.dtype(np.uint16 if like.kind.is_16bit else np.uint8)
    metadata = kept_metadata(like.kind.info, b"GRAY" if like.kind.is_gray else b"RGB ")
    rows = _encode(strips, like, channels)
    with open_whole(path) as file:
        if path.suffix.lower() == ".png":
            PngWriter(file, (*size, channels), dtype, metadata).write_image(rows)
        else:
            write_tiff(file, rows, (*size, channels), dtype, metadata)


@contextmanager
def open_whole(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open an image file that appears under its name only when all is written."""
    try:
        with whole_file(path) as partial, open(partial, "x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ImageWriteError(f"{path}: cannot be written: {reason_of(error)}") from error


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
    import tifffile

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
    added = Image.Exif()
    try:
        added.load(metadata.get("exif", b""))
    except Exception:  # damaged EXIF says nothing against the pixels
        added = Image.Exif()
    for tag in _SKIPPED_TAGS.intersection(added):
        del added[tag]
    for tag, key in ((_XMP_TAG, "xmp"), (_IPTC_TAG, "iptc")):
        if metadata.get(key):
            added[tag] = metadata[key]
    if not len(added):
        return
    file.flush()
    file.seek(0)
    header = file.read(16)
    order = ">" if header[:2] == b"MM" else "<"
    is_big = struct.unpack(order + "H", header[2:4])[0] == _BIG_MAGIC
    pointer, place, count = (
        (8, order + "Q", order + "Q") if is_big else (4, order + "I", order + "H")
    )
    known = _read_rows(file, *struct.unpack_from(place, header, pointer), order, is_big)
    start = _seek_even_end(file)
    added.endian, added.bigtiff = order, is_big
    file.write(added.tobytes(start).removeprefix(b"Exif\0\0")[2 * pointer :])
    if is_big:
        _widen_pointers(file, start, order, (_EXIF_TAG, _GPS_TAG))
    rows = _read_rows(file, start, order, is_big) | known
    directory = _seek_even_end(file)
    packed = b"".join(rows[tag] for tag in sorted(rows))
    file.write(struct.pack(count, len(rows)) + packed + bytes(struct.calcsize(place)))
    file.seek(pointer)
    file.write(struct.pack(place, directory))
    file.seek(0, 2)


def _read_rows(file: BinaryIO, place: int, order: str, is_big: bool) -> dict[int, bytes]:
    """Return the rows of a TIFF's directory by their tags."""
    file.seek(place)
    count, row_bytes = ("Q", 20) if is_big else ("H", 12)
    (num_rows,) = struct.unpack(order + count, file.read(struct.calcsize(order + count)))
    rows = [file.read(row_bytes) for _ in range(num_rows)]
    return {struct.unpack(order + "H", row[:2])[0]: row for row in rows}


def _widen_pointers(file: BinaryIO, place: int, order: str, tags: tuple[int, ...]) -> None:
    """Call a BigTIFF's places of directories 64 bits, which they are, but not to Pillow."""
    for number, (tag, row) in enumerate(_read_rows(file, place, order, is_big=True).items()):
        if tag in tags:
            file.seek(place + 8 + 20 * number + 2)
            file.write(struct.pack(order + "H", _LONG8))
            _widen_pointers(file, *struct.unpack(order + "Q", row[12:]), order, (_INTEROP_TAG,))


def _seek_even_end(file: BinaryIO) -> int:
    """Go to the end of a file, which becomes even; return the place."""
    place = file.seek(0, 2)
    return place + file.write(bytes(place % 2))


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
