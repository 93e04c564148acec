"""Image files read at the precision that they have."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from tadsr.config import MAX_PIXELS
from tadsr.errors import ImageReadError, ImageReadWarning, ImageTooLargeError
from tadsr.image_files import RAW_SUFFIXES
from tadsr.images.array_image import (
    ArrayImage,
    check_unit,
    pixel_bytes,
    read_16bit,
    read_float,
    read_tiff,
)
from tadsr.images.color_space import HDR, profile_of_code_points
from tadsr.images.containers import (
    find_nclx,
    is_jxl,
    open_heif,
    open_jxl,
    open_png,
    raw_size,
    read_raw,
)
from tadsr.images.limits import (
    check_readable,
    check_scans,
    check_size,
    named_errors,
    pillow_opens,
)
from tadsr.images.metadata import (
    find_metadata,
    is_marked,
    read_exif,
    tidy_exif,
    upright_metadata,
    upright_size,
)

# Files of several images of equal rank; others keep thumbnails and depth maps beside the first.
_ANIMATED_FORMATS = ("GIF", "PNG", "WEBP", "AVIF")
_PAGED_FORMATS = ("TIFF", "HEIF")
_PHOTOMETRIC_TAG = 262
_NO_ANIMATION = "{}: must be an animation, but is a TIFF or raw file; read_image reads it"
_MAX_TILES = 2**16
"""Pieces of a file, each of which takes time."""
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def read_image(
    path: str | os.PathLike[str], *, max_pixels: int | None = MAX_PIXELS
) -> Image.Image | ArrayImage:
    """Read an image file whole; of several frames or pages the first, with a warning.

    Args:
        path: The file; HEIC needs the library pillow-heif, JPEG XL pillow-jxl-plugin, and raw
            files rawpy.
        max_pixels: Largest width × height, against decompression bombs. Above `MAX_PIXELS` it
            takes the place of Pillow's own limit, 2 × `PIL.Image.MAX_IMAGE_PIXELS`, for as long as
            the file is read; None leaves that one alone.

    Returns:
        A PIL image in the file's own mode, not yet turned by its EXIF orientation; or an upright
        `ArrayImage` for a PNG or TIFF of 16 bit colours or grey with alpha, and for a float TIFF,
        whose black is 0 and white 1.

    Raises:
        ValueError: If `max_pixels` is below 1.
        ImageReadError: If the file is missing, unreadable, no image, damaged, truncated, empty,
            too large, of a kind that needs a library that is missing, or float beyond [0, 1].
    """
    try:
        with opened(path, max_pixels) as image:
            return _read(image, Path(path), max_pixels)
    except _NotPillows:
        return _read_otherwise(Path(path), max_pixels)


@dataclass(frozen=True)
class FileFacts:
    """What a file's header says."""

    size: tuple[int, int]
    """Width and height in px, upright."""
    num_frames: int
    """More than 1 for an animation."""
    may_be_transparent: bool
    """Whether it has alpha, which may be opaque everywhere."""
    is_ours: bool
    """Whether tadsr made it, as its EXIF says."""


def read_facts(path: str | os.PathLike[str], *, max_pixels: int | None = MAX_PIXELS) -> FileFacts:
    """Read an image file's header."""
    try:
        with opened(path, max_pixels) as image:
            num_frames, is_ours = len(frames_of(image)), is_marked(read_exif(image))
            return FileFacts(upright_size(image), num_frames, image.has_transparency_data, is_ours)
    except _NotPillows:
        if _is_raw(path):
            with named_errors(path):
                return FileFacts(raw_size(Path(path), max_pixels), 1, False, False)
        image = _read_otherwise(Path(path), max_pixels)
        return FileFacts(image.size, 1, image.has_transparency_data, False)


def count_frames(path: str | os.PathLike[str], *, max_pixels: int | None = MAX_PIXELS) -> int:
    """Return the number of frames of an animation: GIF, WebP, APNG or AVIF; else 1.

    Args:
        path: The file.
        max_pixels: As for `read_image`; a file of larger frames counts as 1.

    Raises:
        ImageReadError: If the file is missing.
    """
    check_readable(path, max_pixels)
    with suppress(ImageReadError), opened(path, max_pixels) as image:
        return len(frames_of(image))
    return 1  # `read_image` says what is wrong


def find_losses(path: str | os.PathLike[str], *, max_pixels: int | None = MAX_PIXELS) -> list[str]:
    """Return what `read_image` warns of, but for frames: further pages, and HDR."""
    check_readable(path, max_pixels)
    with suppress(ImageReadError), opened(path, max_pixels) as image:
        return _lost_of(image, Path(path))
    return []


@contextmanager
def opened(path: str | os.PathLike[str], max_pixels: int | None) -> Iterator[Image.Image]:
    """Open a file that Pillow reads, without its pixels; what goes wrong names it."""
    path = check_readable(path, max_pixels)
    with named_errors(path), pillow_opens(max_pixels), open_image(path, max_pixels) as image:
        yield image


def frames_of(image: Image.Image) -> range:
    """Return which of an opened file's images are its frames; one, unless it is an animation."""
    count = getattr(image, "n_frames", 1) if image.format in _ANIMATED_FORMATS else 1
    # An APNG may hold a picture for viewers that do not know APNG, which is no frame.
    return range(1 if image.info.get("default_image") else 0, count)


def _is_raw(path: str | os.PathLike[str]) -> bool:
    return Path(path).suffix.lower() in RAW_SUFFIXES


def open_image(path: Path, max_pixels: int | None) -> Image.Image:
    """Open a file without loading its pixels, as `PIL.Image.open`, HEIC too.

    Raises:
        Exception: Whatever Pillow raises for a damaged file.
    """
    if _is_raw(path):
        raise _NotPillows(_NO_ANIMATION.format(path))
    source, found = open_png(path)
    with open(path, "rb") as file:
        head = file.read(64)
    if is_jxl(head):
        return open_jxl(path, max_pixels)
    try:
        image = Image.open(source)
    except UnidentifiedImageError:
        if head[4:8] == b"ftyp":
            return _open_heif(path, head, max_pixels)
        if head.startswith(_TIFF_MAGIC):
            raise _NotPillows(_NO_ANIMATION.format(path)) from None
        raise
    try:
        if image.format == "EPS":  # Pillow would have Ghostscript run it, whatever its suffix
            raise ImageReadError(
                f"{path}: must be a picture, but is a PostScript program; save it as PNG or TIFF"
            )
        check_size(path, *image.size, max_pixels, pixel_bytes=pixel_bytes(image))
        if len(image.tile) > _MAX_TILES:
            raise ImageTooLargeError(
                f"{path}: must have at most {_MAX_TILES} strips or tiles, got {len(image.tile)}; "
                "save it with larger ones"
            )
    except ImageReadError:
        image.close()
        raise
    image.filename = os.fspath(path)
    return _with_colors(image, path, found)


def _with_colors(
    image: Image.Image, path: Path, found: dict[str, bytes] | None = None
) -> Image.Image:
    """Put what a file tells of its colours without ICC into an opened image's `info`."""
    image.info |= found or {}
    if isinstance(alphas := image.info.get("transparency"), bytes):
        image.info["transparency"] = alphas[:256]  # Pillow fails at more than a palette has
    nclx = find_nclx(path) if image.format in ("AVIF", "HEIF") else None
    if nclx and "icc_profile" not in image.info and max(nclx) < 256:
        image.info["cicp"] = bytes([*nclx, 0, 1])
    if "cicp" in image.info:
        primaries, transfer = image.info["cicp"][:2]
        if transfer not in HDR:
            del image.info["cicp"]
            space = b"GRAY" if image.mode in ("1", "L", "LA", "I;16") else b"RGB "
            profile = profile_of_code_points(primaries, transfer, space)
            if profile is not None or image.format == "PNG":  # where it says more than a profile
                image.info |= {"icc_profile": profile, "srgb": 0}
    return image


def _lost_of(image: Image.Image, path: Path) -> list[str]:
    """Return what of an opened file is not read, but for frames, in sentences."""
    losses = []
    # Not how many: a small file may hold a hundred thousand.
    if image.format in _PAGED_FORMATS and getattr(image, "is_animated", False):
        losses.append(
            f"{path} holds several pages, of which the first is read; split it for the others"
        )
    if "cicp" in image.info:
        curve = HDR[image.info["cicp"][1]]
        losses.append(
            f"{path} is HDR ({curve}), which is restored as if it were not; a PNG keeps what its "
            "values mean, other formats look flat; tone-map it first"
        )
    return losses


class _NotPillows(ImageReadError):  # noqa: N818 - tells where to go on
    """Pillow does not read the file, or not at full precision: a raw file or a TIFF."""


def _read(image: Image.Image, path: Path, max_pixels: int | None) -> Image.Image | ArrayImage:
    """Load an opened image."""
    losses = _lost_of(image, path)
    if (count := frames_of(image).stop) > 1:
        losses.append(
            f"{path} holds {count} frames, of which the first is read; read_frames has them all"
        )
    for loss in losses:
        warnings.warn(loss, ImageReadWarning, stacklevel=3)
    is_tiff = image.format == "TIFF"
    tags = getattr(image, "tag_v2", {})
    if is_tiff and tags.get(284, 1) == 2 and max(tags.get(258, (8,))) == 16:
        raise _NotPillows(_NO_ANIMATION.format(path))
    if image.format in ("JPEG", "MPO"):
        check_scans(path, *image.size, max_pixels)
    pixels = read_16bit(image)
    image.load()
    if is_tiff and image.mode == "F":
        pixels = check_unit(read_float(image), path)
    if pixels is not None:
        return _array_image(pixels, read_exif(image), find_metadata(image))
    plain = image.copy()  # a plain image, which needs the closed file no more
    plain.info = find_metadata(image)
    if is_tiff:
        try:
            plain.info["exif"] = tidy_exif(image.getexif())
        except Exception:  # damaged EXIF says nothing against the pixels
            plain.info["exif"] = None
        if tags.get(_PHOTOMETRIC_TAG) == 0 and image.mode.startswith("I;16"):
            info, inverted = plain.info, 65535 - np.asarray(plain)
            plain = Image.fromarray(inverted)
            plain.info = info
    return plain


def _array_image(pixels: np.ndarray, exif: Image.Exif, info: dict[str, Any]) -> ArrayImage:
    space = b"GRAY" if pixels.shape[2] <= 2 else b"RGB "
    return ArrayImage(pixels, upright_metadata(exif, info, space))


def _read_otherwise(path: Path, max_pixels: int | None) -> ArrayImage:
    if _is_raw(path):
        with named_errors(path):
            return _array_image(*read_raw(path, max_pixels), {})
    try:
        return _array_image(*read_tiff(path, max_pixels))
    except ImageReadError:
        raise
    except Exception as error:
        hint = "; pip install imagecodecs may help" if "imagecodecs" in str(error) else ""
        raise ImageReadError(f"{path}: cannot be read as an image ({error}){hint}") from error


def _open_heif(path: Path, head: bytes, max_pixels: int | None) -> Image.Image:
    if b"avif" in head[8:] or b"avis" in head[8:]:
        raise ImageReadError(
            f"{path}: this build of Pillow cannot read AVIF, which pip's can: pip install -U pillow"
        )
    return _with_colors(open_heif(path, max_pixels), path)
