"""How many pixels a file may promise: our own limit, and Pillow's, which is all the process's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from tadsr.config import MAX_PIXELS
from tadsr.errors import ImageReadError

BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
"""What Pillow says to a file above its limit."""
_WAY_OUT = "if you trust the file, pass a larger max_pixels (tadsr upscale --max-pixels)"
_lifting = threading.RLock()


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
        Image.MAX_IMAGE_PIXELS = None if own is None else max(own, max_pixels)
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = own


def check_size(path: Path, width: int, height: int, max_pixels: int | None) -> None:
    """Raise ImageReadError if an image is empty or has too many pixels."""
    if width * height == 0:
        raise ImageReadError(f"{path}: must have no side of 0 px, got {width}×{height}")
    if max_pixels is not None and width * height > max_pixels:
        raise ImageReadError(
            f"{path}: must have at most {max_pixels} pixels, got {width}×{height} = "
            f"{width * height}; {_WAY_OUT}"
        )


def too_large(path: Path, error: Exception) -> ImageReadError:
    """Return our error for one of `BOMBS`."""
    return ImageReadError(f"{path}: {error} {_WAY_OUT[0].upper()}{_WAY_OUT[1:]}")
