"""Formats that need a library of their own: HEIC, JPEG XL, and cameras' raw files."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from tadsr.errors import ImageReadError, install
from tadsr.images.array_image import ArrayImage
from tadsr.images.limits import check_size
from tadsr.images.metadata import upright_metadata

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


def read_raw(path: Path, max_pixels: int | None) -> ArrayImage:
    """Develop a camera's raw file: its white balance, sRGB, 16 bit, upright, not brightened."""
    with _open_raw(path, max_pixels) as raw:
        pixels = raw.postprocess(
            use_camera_wb=True, no_auto_bright=True, output_bps=16, gamma=_SRGB_CURVE
        )
    exif = Image.Exif()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damage, which says nothing against the pixels
        try:
            with open(path, "rb") as file:
                exif.load_from_fp(file)
                for tag in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
                    exif.get_ifd(tag)
        except Exception:  # no TIFF, or damaged
            exif = Image.Exif()
    return ArrayImage(np.ascontiguousarray(pixels), upright_metadata(exif, {}, b"RGB "))
