"""Images of any kind to float tensors: ranges, alpha, 16 bit, EXIF and ICC."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageCms
from torch import Tensor

from tadsr.images.array_image import ArrayImage
from tadsr.images.limits import unreadable
from tadsr.images.metadata import (
    COLOR_KEYS,
    find_metadata,
    kept_metadata,
    mark_exif,
    read_exif,
    turn_upright,
    upright_metadata,
)
from tadsr.images.tensors import is_colorless, spread_colors

ImageLike: TypeAlias = Image.Image | ArrayImage | np.ndarray | Tensor
OutputType: TypeAlias = Literal["pil", "np", "pt"]
_RANGE_SLACK = 1e-6  # rounding left by a caller's own arithmetic
# What each 8-bit mode becomes before its bands are read.
_BASE_MODES = {
    **dict.fromkeys(("1", "L"), "L"),
    **dict.fromkeys(("LA", "La"), "LA"),
    **dict.fromkeys(("P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"), "RGB"),
    **dict.fromkeys(("PA", "RGBA", "RGBa"), "RGBA"),
}
# Grey modes wider than 8 bit: the mode given back and the value of white.
_WIDE_MODES = dict.fromkeys(("I;16", "I;16L", "I;16B", "I;16N"), ("I;16", 65535.0))
_WIDE_MODES |= {"I": ("I", 65535.0), "F": ("F", 255.0)}
INTEGER_WHITE = {np.dtype(np.uint8): 255.0, np.dtype(np.uint16): 65535.0}
"""What integer arrays hold for 1."""
_FLOAT_DTYPES = (np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64))


@dataclass(frozen=True)
class ImageKind:
    """What an image was before decoding, so that a result can be given back alike.

    Attributes:
        container: "pil", "np" or "pt"; "array" for an `ArrayImage`.
        is_gray: Whether it had one colour channel.
        is_colorless: Whether all that can be seen of it is grey, in as many channels as it had.
        mode: PIL mode to give back, alpha aside: "L", "RGB", "I;16", "I" or "F".
        dtype: Of an array, `ArrayImage` or tensor; None for PIL.
        ndim: Of an array; 2 for (H, W), 3 for (H, W, C).
        device: Of a tensor; None otherwise.
        info: Metadata that stays valid, see `kept_metadata`.
    """

    container: OutputType | Literal["array"]
    is_gray: bool = False
    is_colorless: bool = False
    mode: str = "RGB"
    dtype: Any = None
    ndim: int = 3
    device: torch.device | None = None
    info: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def is_16bit(self) -> bool:
        """Tell whether the image held 16 bit integers, or is an `ArrayImage`."""
        is_wide = self.mode in ("I;16", "I") or self.dtype == np.uint16
        return is_wide or self.container == "array"


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """An image as float tensors, with what is needed to give the same kind back.

    Attributes:
        rgb: float32 (3, H, W) in [0, 1]; grey is replicated, EXIF orientation applied; under
            alpha 0 the colours nearby that can be seen.
        alpha: float32 (1, H, W) in [0, 1], colours not premultiplied by it; None if opaque.
        kind: What the image was.
    """

    rgb: Tensor
    alpha: Tensor | None
    kind: ImageKind


_Parts = tuple[Tensor, Tensor | None, ImageKind]
"""What `DecodedImage` holds."""


def decode_image(image: ImageLike) -> DecodedImage:
    """Turn a PIL image, array or tensor into float tensors in [0, 1].

    Args:
        image: One of
            - a PIL image of any mode, of a multi-frame file the frame it stands at; mode I holds
              0..65535 and mode F 0..255; a CMYK image goes through its ICC profile if it has one;
            - an array (H, W), (H, W, 1), (H, W, 3) or RGBA (H, W, 4): uint8, uint16, or
              float16/32/64 in [0, 1];
            - an `ArrayImage`, as `read_image` gives for 16 bit and float files;
            - a float tensor (3, H, W) in [0, 1], which stays on its device.
    """
    for kind, decode in _DECODERS.items():
        if isinstance(image, kind):
            return _as_seen(*decode(image))
    hint = ""
    if isinstance(image, (list, tuple)):
        hint = "; pass its images one at a time"
    elif isinstance(image, (str, os.PathLike)):
        hint = "; open the file with read_image first"
    elif isinstance(image, bytes) or hasattr(image, "read"):
        hint = "; open it with PIL.Image.open first"
    raise TypeError(
        "image must be a PIL image, an ArrayImage, a NumPy array or a torch tensor, "
        f"not {type(image).__name__}{hint}"
    )


def _as_seen(rgb: Tensor, alpha: Tensor | None, kind: ImageKind) -> DecodedImage:
    """Let nothing count that cannot be seen."""
    if is_colorless(rgb, alpha):
        kind = replace(kind, is_colorless=True)
        rgb = rgb if alpha is None else spread_colors(rgb[:1], alpha).repeat(3, 1, 1)
    elif alpha is not None:
        rgb = spread_colors(rgb, alpha)
    return DecodedImage(rgb, alpha, kind)


def _decode_pil(image: Image.Image) -> _Parts:
    if 0 in image.size:
        raise ValueError(f"image must have no side of 0 px, got {image.width}×{image.height}")
    upright = _load_upright(image)
    exif, found, image = read_exif(image), find_metadata(image), upright
    key = image.info.get("transparency")
    if image.mode in _WIDE_MODES:
        mode, white = _WIDE_MODES[image.mode]
        bands = np.asarray(image)  # [H, W]
    elif image.mode in _BASE_MODES:
        base, white = _convert_to_base(image), 255.0
        mode = "L" if base.mode in ("L", "LA") else "RGB"
        bands = np.asarray(base)  # [H, W] or [H, W, 2..4]
    else:
        raise TypeError(f"image mode {image.mode!r} is not known; convert it to RGB first")
    rgb, alpha = _split_alpha(unit_planes(bands, white, f"an image of mode {image.mode}"))
    if alpha is None and isinstance(key, (int, tuple)) and np.shape(key) == bands.shape[2:]:
        opaque = bands != np.asarray(key)
        opaque = opaque.any(axis=-1) if opaque.ndim == 3 else opaque
        alpha = torch.from_numpy(opaque.astype(np.float32))[None]  # [1, H, W]
    is_gray = mode != "RGB"
    info = upright_metadata(exif, found, b"GRAY" if is_gray else b"RGB ")
    return rgb, alpha, ImageKind("pil", is_gray, mode=mode, info=info)


def _load_upright(image: Image.Image) -> Image.Image:
    """Return a loaded copy turned by its EXIF orientation."""
    try:
        image.load()
    except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
        raise unreadable(getattr(image, "filename", None) or "image", error) from error
    return turn_upright(image)


def _convert_to_base(image: Image.Image) -> Image.Image:
    base, info = _BASE_MODES[image.mode], image.info
    if image.mode == "P":
        if not isinstance(info.get("transparency"), (int, bytes)):
            info.pop("transparency", None)
        base = "RGBA" if image.has_transparency_data else "RGB"
    else:
        info.pop("transparency", None)  # read as a mask instead: Pillow ignores it in some modes
    profile = info.get("icc_profile")
    if image.mode == "CMYK" and isinstance(profile, bytes) and profile[16:20] == b"CMYK":
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            return ImageCms.profileToProfile(
                image, source, ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
        except (ImageCms.PyCMSError, OSError):
            pass  # a damaged profile is as good as none
    return image.convert(base)


def icc_space(mode: str) -> bytes:
    """Return the colour space an ICC profile must name to fit a PIL mode."""
    if mode in ("CMYK", "LAB"):
        return mode.ljust(4).encode()
    is_gray = mode in _WIDE_MODES or _BASE_MODES.get(mode, "RGB").startswith("L")
    return b"GRAY" if is_gray else b"RGB "


def _decode_array_image(image: ArrayImage) -> _Parts:
    white = INTEGER_WHITE.get(image.pixels.dtype, 1.0)
    rgb, alpha = _split_alpha(unit_planes(image.pixels, white, "a float image"))
    mode, space = ("L", b"GRAY") if image.is_gray else ("RGB", b"RGB ")
    info = kept_metadata(image.info, space)
    kind = ImageKind("array", image.is_gray, mode=mode, dtype=image.pixels.dtype, info=info)
    return rgb, alpha, kind


def _decode_array(array: np.ndarray) -> _Parts:
    native = array.dtype.newbyteorder("=")
    if native not in INTEGER_WHITE and native not in _FLOAT_DTYPES:
        raise TypeError(
            "an array image must be uint8, uint16, or float16/32/64 in [0, 1], "
            f"not {array.dtype}; convert it first"
        )
    channels_fit = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if not channels_fit or 0 in array.shape:
        raise ValueError(
            "an array image must have the shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), "
            f"no side 0, got {array.shape}; a list holds several"
        )
    white = INTEGER_WHITE.get(native, 1.0)
    rgb, alpha = _split_alpha(unit_planes(array, white, "a float array"))
    is_gray = array.ndim == 2 or array.shape[2] == 1
    mode = "L" if is_gray else "RGB"
    return rgb, alpha, ImageKind("np", is_gray, mode=mode, dtype=array.dtype, ndim=array.ndim)


def _decode_tensor(tensor: Tensor) -> _Parts:
    if not tensor.is_floating_point():
        raise TypeError(
            f"a tensor image must be floating-point in [0, 1], not {tensor.dtype}; "
            "divide integers by their largest value first"
        )
    if tensor.ndim != 3 or tensor.shape[0] != 3 or tensor.numel() == 0:
        hint = "; decode a batch one image at a time" if tensor.ndim == 4 else ""
        raise ValueError(
            "a tensor image must have the shape (3, H, W), no side 0, "
            f"got {tuple(tensor.shape)}{hint}"
        )
    rgb = _checked_unit(tensor.detach().to(torch.float32), 1.0, "a tensor image")
    return rgb, None, ImageKind("pt", dtype=tensor.dtype, device=tensor.device)


_DECODERS = {
    Image.Image: _decode_pil,
    ArrayImage: _decode_array_image,
    np.ndarray: _decode_array,
    Tensor: _decode_tensor,
}


def strip_metadata(image: Image.Image | ArrayImage) -> Image.Image | ArrayImage:
    """Return an upright copy that has no metadata but what its colours mean.

    Args:
        image: PIL image of any mode, or an `ArrayImage`.

    Returns:
        An image of the same kind with its ICC profile (and a PNG's gamma), without EXIF, XMP,
        IPTC, DPI, texts and comments; transparency stays.
    """
    if isinstance(image, ArrayImage):
        return ArrayImage(image.pixels, {k: v for k, v in image.info.items() if k in COLOR_KEYS})
    upright = _load_upright(image)
    bare = upright.copy()
    bare.info = {k: v for k, v in upright.info.items() if k in (*COLOR_KEYS, "transparency")}
    return bare


def mark_as_made(image: Image.Image | ArrayImage) -> Image.Image | ArrayImage:
    """Return an image whose results say in their EXIF that tadsr has made them."""
    exif = Image.Exif()
    try:
        exif.load(image.info.get("exif") or b"")
        found = image.getexif() if isinstance(image, Image.Image) else exif
        marked = {"exif": mark_exif(found)}
    except Exception:  # damaged EXIF makes Pillow raise nearly anything
        marked = {"exif": mark_exif(Image.Exif())}
    if isinstance(image, ArrayImage):
        return ArrayImage(image.pixels, {**image.info, **marked})
    image.info |= marked
    return image


def lay_over(
    image: Image.Image | ArrayImage, color: tuple[int, int, int]
) -> Image.Image | ArrayImage:
    """Lay an image over a colour; one without alpha is returned as it is.

    Args:
        color: Red, green and blue, 0..255.
    """
    if not image.has_transparency_data:
        return image
    decoded = decode_image(image)
    if decoded.alpha is None:
        return image
    ground = torch.tensor(color, dtype=torch.float32)[:, None, None] / 255
    rgb = decoded.rgb * decoded.alpha + ground * (1 - decoded.alpha)
    is_gray = decoded.kind.is_gray and len(set(color)) == 1
    kind = decoded.kind if is_gray else replace(decoded.kind, is_gray=False, mode="RGB")
    # Here, since encoding builds on decoding.
    from tadsr.images.encoding import encode_image

    like = replace(decoded, kind=replace(kind, is_colorless=False))
    return encode_image(rgb, None, like)


def unit_planes(bands: np.ndarray, white: float, what: str) -> Tensor:
    """Return the bands (H, W) or (H, W, C) as float32 planes (C, H, W) in [0, 1]."""
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes inf, refused below
        values = np.array(bands, dtype=np.float32)
    planes = torch.from_numpy(values).div_(white)
    planes = planes.reshape(*planes.shape[:2], -1).permute(2, 0, 1).contiguous()  # [C, H, W]
    is_unsigned = bands.dtype.kind in "ub" and bands.dtype.itemsize <= 2
    return planes if is_unsigned else _checked_unit(planes, white, what)


def _checked_unit(values: Tensor, white: float, what: str) -> Tensor:
    low, high = (value.item() for value in values.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{what} must be finite, got NaN or infinity; replace them first")
    if low < -_RANGE_SLACK or high > 1 + _RANGE_SLACK:
        raise ValueError(
            f"{what} must be in [0, {white:g}], got {low * white:g}..{high * white:g}; "
            "rescale or clip it first"
        )
    return values.clamp(0, 1)


def _split_alpha(planes: Tensor) -> tuple[Tensor, Tensor | None]:
    has_alpha = planes.shape[0] in (2, 4)
    alpha = planes[-1:].clone() if has_alpha else None
    colors = planes[:-1] if has_alpha else planes
    return colors.repeat(3 // colors.shape[0], 1, 1), alpha
