"""Images of 16 bit and float channels, for which Pillow has no mode."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageMode

from tadsr.errors import ImageReadError
from tadsr.images.containers import open_png, read_exif_of_tiff
from tadsr.images.limits import PIXEL_BYTES, check_size
from tadsr.images.metadata import find_orientation

_DTYPES = (np.dtype(np.uint16), np.dtype(np.float32))
_ORIENTATION_TAG = 274
_XMP_TAG = 700
_MIN_IS_WHITE = 0
_PILLOW_BYTES = 4  # of a pixel of several bands, whatever its mode
_JPEG2000_BYTES = 20  # four a sample, and a copy
_STRIP_PIXELS = 2**20
_BACK_FROM = {6: 8, 8: 6}


@dataclass(frozen=True, eq=False)
class ArrayImage:
    """An upright image with more than 8 bit a channel, and its metadata.

    Args:
        pixels: (H, W, 1..4), uint16 or float32 in [0, 1]: grey, grey and alpha, RGB, or RGBA.
        info: As of `kept_metadata`.

    Raises:
        TypeError: `pixels` has another dtype.
        ValueError: `pixels` has another shape.
    """

    pixels: np.ndarray
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.pixels, np.ndarray) or self.pixels.dtype not in _DTYPES:
            found = getattr(self.pixels, "dtype", type(self.pixels).__name__)
            raise TypeError(f"pixels must be an array of uint16 or float32, not {found}")
        if self.pixels.ndim != 3 or not 1 <= self.pixels.shape[2] <= 4 or 0 in self.pixels.shape:
            raise ValueError(
                f"pixels must be (H, W, 1..4), no side 0, got {tuple(self.pixels.shape)}"
            )

    @property
    def width(self) -> int:
        """Width in px."""
        return self.pixels.shape[1]

    @property
    def height(self) -> int:
        """Height in px."""
        return self.pixels.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in px, as of a PIL image."""
        return self.width, self.height

    @property
    def has_transparency_data(self) -> bool:
        """Whether there is an alpha channel."""
        return self.pixels.shape[2] in (2, 4)

    @property
    def is_gray(self) -> bool:
        """Whether there is one channel of colour."""
        return self.pixels.shape[2] <= 2


def pixel_bytes(image: Image.Image) -> int:
    """Return what a pixel of an opened file takes while it is read."""
    if image.format == "JPEG2000":
        return _JPEG2000_BYTES
    arguments = image.tile[0].args if image.tile else ""
    rawmode = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    layout, wide, _ = str(rawmode).partition(";16")
    if not wide or len(layout) < 3:
        itemsize = ImageMode.getmode(image.mode).typestr[-1]
        return 2 * (int(itemsize) if len(image.getbands()) == 1 else _PILLOW_BYTES)
    channels = len(layout) + ("transparency" in image.info)
    return 2 * _PILLOW_BYTES + 2 * channels  # `read_16bit` decodes twice


def read_16bit(image: Image.Image) -> np.ndarray | None:
    """Read all 16 bit of an opened PNG or TIFF, where Pillow would keep 8.

    Pillow's decoders know raw modes that take the high and such that take the low byte of each
    sample, so that two readings have it all: with every compression, interlacing and tiling.

    Returns:
        Upright pixels (H, W, 2..4), uint16; or None where `image` needs no such reading or
        cannot be read so.
    """
    if image.format not in ("PNG", "TIFF") or not image.tile:
        return None
    tags = getattr(image, "tag_v2", {})
    arguments = image.tile[0].args
    rawmode = arguments if isinstance(arguments, str) else arguments[0]
    layout, _, order = str(rawmode).partition(";16")
    if layout not in ("RGB", "RGBX", "RGBA", "RGBa", "LA") or order not in ("B", "L", "N"):
        return _keyed_gray(image)
    if tags.get(284, 1) != 1:  # Pillow reads apart planes in its own way
        return None
    if layout == "LA":  # four bytes a pixel: both of grey, both of alpha
        image.tile = _with_rawmode(image, "RGBA")
        pixels, stored = _upright_like(image, 2)
        for rows, both in _arrays(image):
            stored[rows] = both[..., 1::2]
            stored[rows] |= both[..., ::2].astype(np.uint16) << 8
        return pixels
    is_big = order == "B" or (order == "N" and sys.byteorder == "big")
    is_premultiplied, layout = layout == "RGBa", layout.upper()
    channels, key = len(image.getbands()), image.info.get("transparency")
    has_key = channels == 3 and isinstance(key, tuple)
    with Image.open(open_png(Path(image.filename))[0]) as again:
        again.tile = _with_rawmode(again, f"{layout};16{'L' if is_big else 'B'}")
        pixels, stored = _upright_like(again, channels + has_key)
        for rows, low in _arrays(again):
            stored[rows, :, :channels] = low
    del again  # its pixels
    image.tile = _with_rawmode(image, f"{layout};16{'B' if is_big else 'L'}")
    for rows, high in _arrays(image):
        stored[rows, :, :channels] |= high.astype(np.uint16) << 8
        if is_premultiplied:
            stored[rows] = _unpremultiplied(stored[rows])
        elif has_key:
            stored[rows, :, 3] = _opaque_beside(key, stored[rows, :, :3])
    return pixels


def read_tiff(path: Path, max_pixels: int | None) -> tuple[np.ndarray, Image.Exif, dict[str, Any]]:
    """Read the first page of a 16 bit or float TIFF that Pillow cannot.

    Returns:
        Upright pixels (H, W, 1..4), uint16 or float32 in [0, 1]; its EXIF; and `icc_profile` and
        `xmp` where there are any.

    Raises:
        Exception: The file is damaged, or compressed in a way that tifffile does not know alone.
    """
    import tifffile

    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        height, width, samples = page.imagelength, page.imagewidth, page.samplesperpixel
        if not all(isinstance(count, int) for count in (height, width, samples)):
            raise ImageReadError(
                f"{path}: must name one height, width and number of samples, but has "
                f"{height}, {width} and {samples}; get an intact copy"
            )
        itemsize = 1 if page.dtype is None else page.dtype.itemsize
        size = itemsize * samples
        check_size(path, width, height, max_pixels, pixel_bytes=max(2 * size, PIXEL_BYTES))
        is_known = page.photometric in (_MIN_IS_WHITE, 1, 2) and 1 <= samples <= 4
        if (
            not is_known
            or page.dtype is None
            or page.dtype.kind + str(page.bitspersample) not in ("u16", "f16", "f32", "f64")
        ):
            raise ImageReadError(
                f"{path}: a TIFF must hold grey or RGB of 8 or 16 bit, or float in [0, 1], got "
                f"{samples} × {page.dtype}; save it as one of these"
            )
        pixels = page.asarray().reshape(
            (height, width, samples) if page.planarconfig == 1 else (samples, height, width)
        )
        if page.planarconfig != 1:
            pixels = np.moveaxis(pixels, 0, 2)
        info = {"icc_profile": page.iccprofile, "xmp": page.tags.valueof(_XMP_TAG)}
        orientation = page.tags.valueof(_ORIENTATION_TAG, default=1)
        is_inverted = page.photometric == _MIN_IS_WHITE
        is_premultiplied = 1 in page.extrasamples
    exif = read_exif_of_tiff(path)
    if pixels.dtype.kind == "f":
        pixels = check_unit(pixels.astype(np.float32, copy=False), path)
    else:
        pixels = pixels.astype(np.uint16, copy=False)
    if is_inverted:
        pixels = (1 if pixels.dtype.kind == "f" else 65535) - pixels
    if is_premultiplied and pixels.shape[2] in (2, 4):
        for rows in _row_slices(height, width):
            pixels[rows] = _unpremultiplied(pixels[rows])
    return np.ascontiguousarray(_turned(pixels, orientation)), exif, info


def check_unit(pixels: np.ndarray, path: Path) -> np.ndarray:
    """Return float pixels, which must be in [0, 1]."""
    low, high = float(pixels.min()), float(pixels.max())
    if not 0 <= low <= high <= 1:  # NaN too
        raise ImageReadError(
            f"{path}: float pixels must be from 0 (black) to 1 (white), got {low:g}..{high:g}; "
            "rescale or tone-map them first"
        )
    return pixels


def _with_rawmode(image: Image.Image, rawmode: str) -> list[Any]:
    return [
        tile._replace(args=rawmode if isinstance(tile.args, str) else (rawmode, *tile.args[1:]))
        for tile in image.tile
    ]


def _keyed_gray(image: Image.Image) -> np.ndarray | None:
    """Read 16 bit grey of which one value is transparent."""
    key = image.info.get("transparency")
    if not image.mode.startswith("I;16") or not isinstance(key, int):
        return None
    pixels, stored = _upright_like(image, 2)
    for rows, gray in _arrays(image):
        stored[rows, :, 0] = gray
        stored[rows, :, 1] = _opaque_beside((key,), stored[rows, :, :1])
    return pixels


def _opaque_beside(key: tuple[int, ...], colors: np.ndarray) -> np.ndarray:
    """Return alpha (rows, W): 0 where the colours are the key, 65535 elsewhere."""
    is_key = [colors[..., channel] == value for channel, value in enumerate(key)]
    return np.where(np.logical_and.reduce(is_key), 0, 65535)


def read_float(image: Image.Image) -> np.ndarray:
    """Return an opened image of mode F as upright pixels (H, W, 1), float32."""
    pixels, stored = _upright_like(image, 1, np.float32)
    for rows, gray in _arrays(image):
        stored[rows, :, 0] = gray
    return pixels


def _upright_like(
    image: Image.Image, channels: int, dtype: type = np.uint16
) -> tuple[np.ndarray, np.ndarray]:
    """Return room for an image's pixels, upright, and a view of it that lies as the image does."""
    image.load()  # where its orientation may stand
    orientation = find_orientation(image)
    width, height = image.size
    blank = np.broadcast_to(np.zeros(1, dtype), (height, width, channels))
    pixels = np.empty(_turned(blank, orientation).shape, dtype)
    return pixels, _turned(pixels, _BACK_FROM.get(orientation, orientation))


def strips(image: Image.Image) -> Iterator[tuple[slice, Image.Image]]:
    """Yield an image's rows some at a time, to be converted without three copies of them all."""
    image.load()  # where its size may change
    for rows in _row_slices(image.height, image.width):
        yield rows, image.crop((0, rows.start, image.width, rows.stop))


def _arrays(image: Image.Image) -> Iterator[tuple[slice, np.ndarray]]:
    for rows, strip in strips(image):
        yield rows, np.asarray(strip)


def _row_slices(height: int, width: int) -> Iterator[slice]:
    step = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, step):
        yield slice(top, min(top + step, height))


def _unpremultiplied(pixels: np.ndarray) -> np.ndarray:
    white = 1.0 if pixels.dtype.kind == "f" else 65535.0
    alpha = pixels[..., -1:].astype(np.float64)
    colors = pixels[..., :-1] * white / np.where(alpha == 0, 1, alpha)
    colors = colors if white == 1 else np.floor(colors + 0.5)
    return np.concatenate([colors.clip(0, white).astype(pixels.dtype), pixels[..., -1:]], -1)


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn pixels upright by their EXIF orientation."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels
