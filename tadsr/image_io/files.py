"""Image files: read whole, written whole or not at all."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features

from tadsr.errors import ImageReadError, ImageWriteError
from tadsr.image_io.codec import (
    decode_image,
    encode_image,
    icc_space,
    kept_metadata,
    unit_planes,
    unreadable,
)
from tadsr.whole_file import whole_file

MAX_PIXELS = 178_956_970  # where Pillow itself refuses to open a file, by default
# What can be written, if this build of Pillow can.
_SUFFIXES = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
    ".avif": "AVIF",
}
_OPAQUE_FORMATS = ("JPEG", "BMP")
_LARGEST_SIDE_PX = {"JPEG": 65500, "WEBP": 16383}
_JPEG_EXIF_BYTES = 65533
_FILE_MODES = {
    "PNG": ("1", "L", "LA", "I;16", "P", "RGB", "RGBA"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "TIFF": ("1", "L", "LA", "I;16", "I", "F", "P", "RGB", "RGBA", "CMYK"),
    "BMP": ("1", "L", "P", "RGB"),
    "AVIF": ("RGB", "RGBA"),
}


def read_image(path: str | os.PathLike[str], *, max_pixels: int | None = MAX_PIXELS) -> Image.Image:
    """Read an image file whole; of several frames, the first.

    Args:
        path: The file.
        max_pixels: Largest width × height, against decompression bombs; None for no limit but
            Pillow's own, 2 × `PIL.Image.MAX_IMAGE_PIXELS`, which holds in any case.

    Returns:
        The image in the file's own mode, not yet turned by its EXIF orientation.

    Raises:
        ValueError: If `max_pixels` is below 1.
        ImageReadError: If the file is missing, unreadable, no image, damaged, truncated, empty
            or too large.
    """
    path = Path(path)
    if max_pixels is not None and max_pixels < 1:
        raise ValueError(f"max_pixels must be at least 1 or None, got {max_pixels}")
    if not os.path.exists(path):  # Path.exists raises where a folder above is closed to us
        raise ImageReadError(f"{path}: an image file must exist, found none; check the path")
    if os.path.isdir(path):
        raise ImageReadError(f"{path}: must be an image file, but is a folder; name a file in it")
    if not os.path.isfile(path):  # a pipe would be waited for, for ever
        raise ImageReadError(f"{path}: must be a file, but is a pipe or device; save it first")
    try:
        with Image.open(path) as image:
            _check_file_size(path, image.size, max_pixels)
            image.load()
            return image.copy()  # a plain image, which needs the closed file no more
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageReadError(
            f"{path}: {error} If you trust the file, raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    except ImageReadError:
        raise
    except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
        raise unreadable(path, error) from error


def check_writable(
    path: str | os.PathLike[str],
    *,
    overwrite: bool = True,
    format: str | None = None,
    has_alpha: bool = False,
    size: tuple[int, int] | None = None,
) -> None:
    """Raise unless `write_image` could write such an image; writes nothing.

    Args:
        path: The file to be.
        overwrite: Whether an existing file may be replaced.
        format: As for `write_image`.
        has_alpha: Whether the image will have an alpha channel.
        size: (width, height) in px that the image will have; None skips that check.

    Raises:
        ImageWriteError: If the folder is missing or not writable, the file exists and may not be
            replaced, or the format is unknown, or cannot hold the alpha channel or the size.
    """
    path, format = Path(path), _file_format(Path(path), format)
    if not os.path.isdir(path.parent):
        raise ImageWriteError(f"{path}: its folder must exist, but does not; create it first")
    if os.path.isdir(path):
        raise ImageWriteError(f"{path}: must name a file, but is a folder")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ImageWriteError(f"{path}: its folder is not writable; choose another")
    if os.path.lexists(path) and not overwrite:
        raise ImageWriteError(f"{path}: exists already; pass overwrite=True to replace it")
    if has_alpha and format in _OPAQUE_FORMATS:
        raise ImageWriteError(
            f"{path}: {format} cannot hold an alpha channel; write PNG or WebP, or drop it first"
        )
    limit = _LARGEST_SIDE_PX.get(format)
    if size and limit and max(size) > limit:
        raise ImageWriteError(
            f"{path}: {format} holds at most {limit} px a side, not {size[0]}×{size[1]}; write PNG"
        )


def write_image(
    image: Image.Image,
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    quality: int | None = None,
    overwrite: bool = True,
) -> None:
    """Write an image file whole or not at all.

    ICC profile, EXIF and dpi are kept where the format has a place for them. A mode that the
    format cannot hold is converted, so that 16 bit become 8 in JPEG, WebP, BMP and AVIF.

    Args:
        image: PIL image of any mode.
        path: The file; its suffix chooses the format.
        format: "PNG", "JPEG", "WebP", "TIFF", "BMP" or "AVIF", in place of the suffix's.
        quality: 1 (small) to 100; None for 95 in JPEG, 90 in WebP and AVIF; others ignore it.
        overwrite: Whether an existing file may be replaced.

    Raises:
        TypeError: If `image` is not a PIL image or `quality` not an int.
        ValueError: If `quality` is not in 1..100, or a mode I or F image that the format cannot
            hold is outside 0..65535 or 0..255.
        ImageWriteError: If `check_writable` says so, or writing fails, which leaves any existing
            file as it was.
    """
    if not isinstance(image, Image.Image):
        raise TypeError(
            f"image must be a PIL image, not {type(image).__name__}; "
            "encode_image(..., output_type='pil') gives one"
        )
    if quality is not None and (isinstance(quality, bool) or not isinstance(quality, int)):
        raise TypeError(f"quality must be an int from 1 to 100, not {type(quality).__name__}")
    if quality is not None and not 1 <= quality <= 100:
        raise ValueError(f"quality must be from 1 to 100, got {quality}")
    check_writable(
        path,
        overwrite=overwrite,
        format=format,
        has_alpha=image.has_transparency_data,
        size=image.size,
    )
    format = _file_format(Path(path), format)
    image = _fit_mode(image, format)
    options = _save_options(image, format, quality)
    try:
        with whole_file(path) as partial, open(partial, "x+b") as file:
            image.save(file, format=format, **options)
            file.flush()
            os.fsync(file.fileno())
    except Exception as error:
        raise ImageWriteError(f"{path}: cannot be written as {format}: {error!r}") from error


@functools.cache
def _writable_suffixes() -> dict[str, str]:
    Image.init()
    return {suffix: name for suffix, name in _SUFFIXES.items() if name in Image.SAVE}


def _file_format(path: Path, format: str | None) -> str:
    suffix = path.suffix if format is None else f".{format}"
    found = _writable_suffixes().get(suffix.lower())
    if found is None:
        known = " ".join(_writable_suffixes())
        raise ImageWriteError(f"{path}: cannot write {suffix or 'no suffix'!r}; use one of {known}")
    return found


def _fit_mode(image: Image.Image, format: str) -> Image.Image:
    modes = _FILE_MODES[format]
    if image.mode == "I" and "I;16" in modes and "I" not in modes:
        bands = np.asarray(image)
        unit_planes(bands, 65535.0, "an image of mode I")  # checks the range
        narrow = Image.fromarray(bands.astype(np.uint16))
        narrow.info = dict(image.info)
        return narrow
    # Only PNG writes a transparent colour or palette entry; others need an alpha channel.
    keyed = format != "PNG" and image.has_transparency_data and image.mode[-1] not in "Aa"
    if image.mode in modes and not keyed:
        return image
    decoded = decode_image(image)
    image = encode_image(decoded.rgb, decoded.alpha, decoded, "pil")
    if image.mode in modes:
        return image
    return image.convert("RGB" if decoded.alpha is None else "RGBA")


def _save_options(image: Image.Image, format: str, quality: int | None) -> dict[str, Any]:
    # icc_profile=None overrules savers that look into image.info by themselves.
    options = {"icc_profile": None, **kept_metadata(image.info, icc_space(image.mode))}
    if format == "JPEG":
        options |= {"quality": quality or 95, "subsampling": 0}
        if len(options.get("exif", b"")) > _JPEG_EXIF_BYTES:
            del options["exif"]
    elif format in ("WEBP", "AVIF"):
        options["quality"] = quality or 90
    elif format == "PNG":
        options["compress_level"] = 4
    elif format == "TIFF" and features.check_codec("libtiff"):
        options["compression"] = "tiff_lzw"
    return options


def _check_file_size(path: Path, size: tuple[int, int], max_pixels: int | None) -> None:
    width, height = size
    if width * height == 0:
        raise ImageReadError(f"{path}: must have no side of 0 px, got {width}×{height}")
    if max_pixels is not None and width * height > max_pixels:
        raise ImageReadError(
            f"{path}: must have at most {max_pixels} pixels, got {width}×{height} = "
            f"{width * height}; pass a larger max_pixels if you trust the file"
        )
