"""Formats that Pillow does not read, or not all of: PNG, AVIF, HEIC, JPEG XL and raw files."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin

from tadsr.errors import ImageReadError, install
from tadsr.images.limits import check_size

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COMPRESSED = (b"zTXt", b"iTXt", b"iCCP")
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_LEAST_TEXT = 2**13
"""Bytes that a text counts for, whose own costs are as large."""
_MAX_CHUNKS = 2**18
"""As many as a PNG of two gigabytes has; each takes time."""
_LARGEST_PROFILE = 2**26
_LARGEST_META = 2**24
_JXL_CODESTREAM, _JXL_CONTAINER = b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"
_JXL_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
_JXL_SIDE_BITS = (9, 13, 18, 30)
"""From the size header of ISO/IEC 18181-1."""
_SRGB_CURVE = (2.4, 12.92)
"""Exponent and slope near black, as LibRaw takes them."""
_RAW_PIXEL_BYTES = 12
"""What a pixel takes while it is developed: the sensor's values, and 16 bit of three colours."""
_FLIPS_ON_THE_SIDE = (5, 6)
"""LibRaw's names of a quarter turn."""


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


def is_jxl(head: bytes) -> bool:
    """Tell whether a file's first 12 bytes are those of JPEG XL."""
    return head.startswith((_JXL_CODESTREAM, _JXL_CONTAINER))


def knows_jxl() -> bool:
    """Have Pillow know JPEG XL, and tell whether it does."""
    try:
        import pillow_jxl  # noqa: F401
    except ImportError:
        return False
    return True


def open_jxl(path: Path, max_pixels: int | None) -> Image.Image:
    """Open a JPEG XL; its pixels are decoded at once, so that its size is read here first."""
    if not knows_jxl():
        raise ImageReadError(
            f"{path}: JPEG XL needs the library pillow-jxl-plugin; {install('jxl')}, or convert "
            "the file to PNG"
        )
    from pillow_jxl.JpegXLImagePlugin import JXLImageFile

    check_size(path, *_jxl_size(path), max_pixels)
    image = JXLImageFile(path)
    if image.mode not in ("L", "LA", "RGB", "RGBA"):
        raise ImageReadError(
            f"{path}: a JPEG XL must have 8 bit here, got {image.mode}; convert it to PNG"
        )
    # The decoder has turned it upright, and EXIF does not count beside that.
    exif = image.getexif()
    if exif.get(ExifTags.Base.Orientation, 1) != 1:
        exif[ExifTags.Base.Orientation] = 1
        image.info["exif"] = exif.tobytes()
    return image


def _jxl_size(path: Path) -> tuple[int, int]:
    """Return width and height in px of a JPEG XL, from its header."""
    with open(path, "rb") as file:
        head = file.read(12)
        while head.startswith(_JXL_CONTAINER) or not head.startswith(_JXL_CODESTREAM):
            box = file.read(8)
            if len(box) < 8:
                raise ImageReadError(f"{path}: must be JPEG XL, but holds no picture")
            size, kind = int.from_bytes(box[:4], "big"), box[4:]
            length = int.from_bytes(file.read(8), "big") - 16 if size == 1 else size - 8
            if kind in (b"jxlc", b"jxlp"):
                file.seek(4 * (kind == b"jxlp"), 1)  # the number of the part
                head = file.read(12)
                break
            if size == 0 or length < 0:
                raise ImageReadError(f"{path}: must be JPEG XL, but holds no picture")
            file.seek(length, 1)
    bits = int.from_bytes(head[2:], "little")

    def take(count: int) -> int:
        nonlocal bits
        value, bits = bits & ((1 << count) - 1), bits >> count
        return value

    def side(is_small: bool) -> int:
        return 8 * (1 + take(5)) if is_small else 1 + take(_JXL_SIDE_BITS[take(2)])

    is_small = bool(take(1))
    height = side(is_small)
    ratio = take(3)
    if ratio:
        across, down = _JXL_RATIOS[ratio - 1]
        return height * across // down, height
    return side(is_small), height


def open_heif(path: Path, max_pixels: int | None) -> Image.Image:
    """Open a HEIC."""
    try:
        from pillow_heif import HeifImageFile
    except ImportError as error:
        raise ImageReadError(
            f"{path}: HEIC needs the library pillow-heif; {install('heif')}, or convert the file "
            "to JPEG or PNG"
        ) from error
    # Opened by its own class: registering it with Pillow would change every other use of Pillow.
    image = HeifImageFile(path)
    check_size(path, *image.size, max_pixels)
    return image


@contextmanager
def _open_raw(path: Path, max_pixels: int | None) -> Iterator[Any]:
    try:
        import rawpy
    except ImportError as error:
        raise ImageReadError(
            f"{path}: raw files need the library rawpy; {install('raw')}, or develop the file "
            "to TIFF or PNG"
        ) from error
    with rawpy.imread(str(path)) as raw:
        sizes = raw.sizes
        check_size(path, sizes.width, sizes.height, max_pixels, pixel_bytes=_RAW_PIXEL_BYTES)
        yield raw


def raw_size(path: Path, max_pixels: int | None) -> tuple[int, int]:
    """Return a raw file's width and height in px, upright."""
    with _open_raw(path, max_pixels) as raw:
        sizes = raw.sizes
        is_on_its_side = sizes.flip in _FLIPS_ON_THE_SIDE
        return (sizes.height, sizes.width) if is_on_its_side else (sizes.width, sizes.height)


def read_raw(path: Path, max_pixels: int | None) -> tuple[np.ndarray, Image.Exif]:
    """Develop a camera's raw file: its white balance, sRGB, 16 bit, upright, not brightened."""
    with _open_raw(path, max_pixels) as raw:
        pixels = raw.postprocess(
            use_camera_wb=True, no_auto_bright=True, output_bps=16, gamma=_SRGB_CURVE
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damage, which says nothing against the pixels
        try:
            exif = read_exif_of_tiff(path)
        except Exception:  # no TIFF, or damaged
            exif = Image.Exif()
    return np.ascontiguousarray(pixels), exif


def read_exif_of_tiff(path: Path) -> Image.Exif:
    """Read the EXIF of a file that is laid out like a TIFF, as far as it outlives the file."""
    exif = Image.Exif()
    with open(path, "rb") as file:
        exif.load_from_fp(file)
        for tag in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
            exif.get_ifd(tag)
    return exif
