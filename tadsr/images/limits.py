"""What is read of a file at all: how many pixels it may promise, and errors that name it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from tadsr.config import MAX_PIXELS
from tadsr.errors import ImageReadError, ImageTooLargeError
from tadsr.locks import Lock

BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
"""What Pillow says to a file above its limit."""
_WAY_OUT = "if you trust the file, pass a larger max_pixels (tadsr upscale --max-pixels)"
PIXEL_BYTES = 8
"""What a pixel of 8-bit colours takes while it is read: Pillow's four bytes, and a copy."""
FRAME_PIXEL_BYTES = 16
"""The same of an animation: also what Pillow keeps of the last frame and the one it draws."""
_LEAST_FRAME_PIXELS = 2**13
"""What each frame counts for, whose own costs are as large."""
_MAX_SCANS = 20
"""Of a JPEG of the most pixels; each takes time for all of them, and progressive ones have ten."""
_SMALL_FILES_SHARE = 3
_MOST_PACKED = 400
"""Bytes in memory to one of a file, above which it is small: a JPEG of one colour is below."""


class _LiftingLock(Lock):
    """Held while Pillow's own limit is lifted."""

    def __init__(self) -> None:
        super().__init__()
        self.lifted_from: list[int | None] = []

    def was_held(self) -> None:
        if self.lifted_from:
            Image.MAX_IMAGE_PIXELS = self.lifted_from[0]
            self.lifted_from.clear()


_lifting = _LiftingLock()


@contextmanager
def pillow_opens(max_pixels: int | None) -> Iterator[None]:
    """Let Pillow open as many pixels as were asked for; its own limit is back afterwards.

    Other threads that use Pillow see the larger limit meanwhile.

    Args:
        max_pixels: What Pillow may open; up to `MAX_PIXELS`, or None, its limit stays as it is.
    """
    if max_pixels is None or max_pixels <= MAX_PIXELS:
        yield
        return
    with _lifting:  # a second reader would take the larger limit for Pillow's own
        own = Image.MAX_IMAGE_PIXELS
        _lifting.lifted_from.append(own)
        Image.MAX_IMAGE_PIXELS = None if own is None else max(own, max_pixels)
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = own
            _lifting.lifted_from.pop()


def check_size(
    path: Path,
    width: int,
    height: int,
    max_pixels: int | None,
    *,
    pixel_bytes: int = PIXEL_BYTES,
    num_frames: int = 1,
) -> None:
    """Raise ImageReadError if an image is empty, or small in its file but not in memory."""
    if width * height == 0:
        raise ImageReadError(f"{path}: must have no side of 0 px, got {width}×{height}")
    if max_pixels is None:
        return
    num_pixels, found = width * height, f"got {width}×{height} = {width * height}; {_WAY_OUT}"
    if num_pixels > max_pixels:
        raise ImageTooLargeError(f"{path}: must have at most {max_pixels} pixels, {found}")
    if num_pixels * pixel_bytes > max_pixels * PIXEL_BYTES:
        raise ImageTooLargeError(
            f"{path}: must have at most {max_pixels * PIXEL_BYTES // pixel_bytes} pixels, which "
            f"take {pixel_bytes} bytes each to read, {found}"
        )
    most = max(max_pixels, MAX_PIXELS) * PIXEL_BYTES // _SMALL_FILES_SHARE
    if num_pixels * pixel_bytes > max(most, os.path.getsize(path) * _MOST_PACKED):
        raise ImageTooLargeError(
            f"{path}: a file of only {os.path.getsize(path)} bytes must have at most "
            f"{most // pixel_bytes} pixels, {found}"
        )
    is_long = num_frames * _LEAST_FRAME_PIXELS > max(max_pixels, MAX_PIXELS)
    if is_long or num_pixels * num_frames > max_pixels:
        raise ImageTooLargeError(
            f"{path}: all frames must have at most {max_pixels} pixels together, got "
            f"{num_frames} × {width}×{height}; {_WAY_OUT}"
        )


def check_scans(path: Path, width: int, height: int, max_pixels: int | None) -> None:
    """Raise ImageReadError if a JPEG goes through its pixels very often."""
    num_scans = path.read_bytes().count(b"\xff\xda")
    most = max(max_pixels or 0, MAX_PIXELS) * _MAX_SCANS // (width * height)
    if max_pixels is not None and num_scans > most:
        raise ImageTooLargeError(
            f"{path}: a JPEG of {width}×{height} must have at most {most} scans, got {num_scans}; "
            f"{_WAY_OUT}"
        )


def check_readable(path: str | os.PathLike[str], max_pixels: int | None) -> Path:
    """Return the path of a file that exists, or raise as `read_image` does."""
    path = Path(path)
    if max_pixels is not None and max_pixels < 1:
        raise ValueError(f"max_pixels must be at least 1 or None, got {max_pixels}")
    if not os.path.exists(path):  # Path.exists raises where a folder above is closed to us
        raise ImageReadError(f"{path}: an image file must exist, found none; check the path")
    if os.path.isdir(path):
        raise ImageReadError(f"{path}: must be an image file, but is a folder; name a file in it")
    if not os.path.isfile(path):  # a pipe would be waited for, for ever
        raise ImageReadError(f"{path}: must be a file, but is a pipe or device; save it first")
    if not os.path.getsize(path):  # as the kernel's own files, of which some are waited for, too
        raise ImageReadError(f"{path}: must hold an image, but is empty; copy it again")
    return path


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Turn what reading a file raises into an `ImageReadError` that names it."""
    try:
        yield
    except BOMBS as error:
        raise ImageTooLargeError(f"{path}: {error} {_WAY_OUT[0].upper()}{_WAY_OUT[1:]}") from error
    except ImageReadError:
        raise
    except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
        raise unreadable(path, error) from error


def unreadable(name: object, error: Exception) -> ImageReadError:
    """Put what Pillow raised into one sentence about the file."""
    if isinstance(error, UnidentifiedImageError):
        return ImageReadError(f"{name}: must be an image, but is none that Pillow knows")
    if isinstance(error, PermissionError):
        return ImageReadError(f"{name}: must be readable, but permission is denied")
    return ImageReadError(f"{name}: cannot be read as an image ({error}); get an intact copy")
