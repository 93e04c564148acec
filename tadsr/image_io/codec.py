"""Images of any kind to float tensors and back: ranges, alpha, 16 bit, EXIF and ICC."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageCms, UnidentifiedImageError
from torch import Tensor

from tadsr.errors import ImageReadError
from tadsr.image_io.array_image import ArrayImage
from tadsr.image_io.metadata import COLOR_KEYS, exif_dpi, kept_metadata, tidy_exif, turn_upright

ImageLike: TypeAlias = Image.Image | ArrayImage | np.ndarray | Tensor
OutputType: TypeAlias = Literal["pil", "np", "pt"]
OUTPUT_TYPES = ("pil", "np", "pt")
_RANGE_SLACK = 1e-6  # rounding left by a caller's own arithmetic
_LUMA_BT601 = (0.299, 0.587, 0.114)
# What each 8-bit mode becomes before its bands are read.
_BASE_MODES = {
    "1": "L",
    "L": "L",
    "LA": "LA",
    "La": "LA",
    "P": "RGB",
    "PA": "RGBA",
    "RGB": "RGB",
    "RGBA": "RGBA",
    "RGBX": "RGB",
    "RGBa": "RGBA",
    "CMYK": "RGB",
    "YCbCr": "RGB",
    "HSV": "RGB",
    "LAB": "RGB",
}
# Grey modes wider than 8 bit: the mode given back and the value of white.
_WIDE_MODES = {
    "I;16": ("I;16", 65535.0),
    "I;16L": ("I;16", 65535.0),
    "I;16B": ("I;16", 65535.0),
    "I;16N": ("I;16", 65535.0),
    "I": ("I", 65535.0),
    "F": ("F", 255.0),
}
_INTEGER_WHITE = {np.dtype(np.uint8): 255.0, np.dtype(np.uint16): 65535.0}
_FLOAT_DTYPES = (np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64))


@dataclass(frozen=True)
class ImageKind:
    """What an image was before decoding, so that a result can be given back alike.

    Attributes:
        container: "pil", "np" or "pt"; "array" for an `ArrayImage`.
        is_gray: Whether it had one colour channel.
        mode: PIL mode to give back, alpha aside: "L", "RGB", "I;16", "I" or "F".
        dtype: Of an array, `ArrayImage` or tensor; None for PIL.
        ndim: Of an array; 2 for (H, W), 3 for (H, W, C).
        device: Of a tensor; None otherwise.
        info: Metadata that stays valid, see `kept_metadata`.
    """

    container: OutputType | Literal["array"]
    is_gray: bool = False
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
        rgb: float32 (3, H, W) in [0, 1]; grey is replicated, EXIF orientation applied.
        alpha: float32 (1, H, W) in [0, 1], colours not premultiplied by it; None if opaque.
        kind: What the image was.
    """

    rgb: Tensor
    alpha: Tensor | None
    kind: ImageKind


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

    Returns:
        The decoded image; it shares no memory with `image`.

    Raises:
        TypeError: If the type or dtype is none of these.
        ValueError: If the shape, a side of 0 px, NaN, infinity or the range is wrong.
        ImageReadError: If the pixels of a lazily opened PIL image cannot be loaded.
    """
    if isinstance(image, Image.Image):
        return _decode_pil(image)
    if isinstance(image, ArrayImage):
        return _decode_array_image(image)
    if isinstance(image, np.ndarray):
        return _decode_array(image)
    if isinstance(image, Tensor):
        return _decode_tensor(image)
    hint = ""
    if isinstance(image, (list, tuple)):
        hint = "; pass its images one at a time"
    elif isinstance(image, (str, os.PathLike)):
        hint = "; open the file with read_image first"
    raise TypeError(
        "image must be a PIL image, an ArrayImage, a NumPy array or a torch tensor, "
        f"not {type(image).__name__}{hint}"
    )


def encode_image(
    rgb: Tensor,
    alpha: Tensor | None,
    like: DecodedImage,
    output_type: OutputType | None = None,
) -> ImageLike:
    """Turn tensors back into the kind of image that was decoded.

    Grey stays grey, by BT.601 luma. PIL modes come back as they were, except 1 as L; P and the
    colour spaces as RGB; premultiplied as plain alpha; and 16-bit grey with alpha, which Pillow
    has no mode for, as 8-bit LA. Integers are rounded half up.

    Args:
        rgb: Float (3, H, W), clamped to [0, 1]; H and W may differ from those decoded. Or bytes,
            where `takes_bytes`.
        alpha: Float (1, H, W), clamped to [0, 1], attached as it is; None for an opaque result.
        like: The decoded image whose kind to give back.
        output_type: None for that kind; "pil" for an 8-bit PIL image; "np" for an array
            (H, W, 3), or (H, W, 4) with alpha, of uint8, or uint16 if the input was 16 bit;
            "pt" for a float32 tensor (3, H, W) in [0, 1], without alpha.

    Returns:
        The image; a tensor is on the input tensor's device, or on that of `rgb` if the input
        was none.

    Raises:
        TypeError: If `rgb` or `alpha` is neither of these.
        ValueError: If a shape or `output_type` is wrong, or a value is NaN or infinite.
    """
    if output_type is not None and output_type not in OUTPUT_TYPES:
        choices = ", ".join(map(repr, OUTPUT_TYPES))
        raise ValueError(f"output_type must be None, {choices}; got {output_type!r}")
    may_be_bytes = takes_bytes(like, output_type)
    rgb = _checked_result(rgb, "rgb", channels=3, may_be_bytes=may_be_bytes)
    if alpha is not None:
        alpha = _checked_result(alpha, "alpha", channels=1)
        if alpha.shape[1:] != rgb.shape[1:]:
            raise ValueError(
                f"alpha must have rgb's height and width {tuple(rgb.shape[1:])}, "
                f"got {tuple(alpha.shape[1:])}"
            )
        alpha = alpha.to(rgb.device)
        if rgb.dtype == torch.uint8:
            alpha = _to_integers(alpha, np.dtype(np.uint8))
    kind = like.kind
    if kind.is_gray:
        weights = rgb.new_tensor(_LUMA_BT601).view(3, 1, 1)
        rgb = (rgb * weights).sum(dim=0, keepdim=True).clamp_(0, 1)  # [1, H, W]
    container = output_type or kind.container
    if container == "pt":
        dtype = kind.dtype if output_type is None else torch.float32
        return rgb.expand(3, -1, -1).to(kind.device or rgb.device, dtype).contiguous()
    if container == "array":
        planes = rgb if alpha is None else torch.cat([rgb, alpha])
        return ArrayImage(_to_bands(planes, kind.dtype), kind.info)
    if container == "np":
        return _encode_array(rgb, alpha, kind, same_layout=output_type is None)
    return _encode_pil(rgb, alpha, kind, wide=output_type is None)


def takes_bytes(like: DecodedImage, output_type: OutputType | None = None) -> bool:
    """Return whether `encode_image` can do with bytes: the result has three colours of 8 bit."""
    kind = like.kind
    container = output_type or kind.container
    is_8bit = container == "pil"
    if container == "np":
        is_8bit = kind.dtype == np.uint8 if output_type is None else not kind.is_16bit
    return is_8bit and not kind.is_gray


def _decode_pil(image: Image.Image) -> DecodedImage:
    if 0 in image.size:
        raise ValueError(f"image must have no side of 0 px, got {image.width}×{image.height}")
    image, exif, dpi = _load_upright(image)
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
    found = {"dpi": dpi} | image.info | {"exif": exif}
    info = kept_metadata(found, b"GRAY" if is_gray else b"RGB ")
    return DecodedImage(rgb, alpha, ImageKind("pil", is_gray, mode, info=info))


def _load_upright(
    image: Image.Image,
) -> tuple[Image.Image, bytes | None, tuple[float, float] | None]:
    """Return a loaded copy turned by its EXIF orientation, its EXIF then, and the DPI in it."""
    try:
        image.load()
    except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
        raise unreadable(getattr(image, "filename", None) or "image", error) from error
    upright = turn_upright(image)
    try:
        exif = image.getexif()
        return upright, tidy_exif(exif), exif_dpi(exif)
    except Exception:  # damaged EXIF says nothing against the pixels
        return upright, None, None


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


def _decode_array_image(image: ArrayImage) -> DecodedImage:
    white = _INTEGER_WHITE.get(image.pixels.dtype, 1.0)
    rgb, alpha = _split_alpha(unit_planes(image.pixels, white, "a float image"))
    mode, space = ("L", b"GRAY") if image.is_gray else ("RGB", b"RGB ")
    info = kept_metadata(image.info, space)
    kind = ImageKind("array", image.is_gray, mode, image.pixels.dtype, info=info)
    return DecodedImage(rgb, alpha, kind)


def _decode_array(array: np.ndarray) -> DecodedImage:
    native = array.dtype.newbyteorder("=")
    if native not in _INTEGER_WHITE and native not in _FLOAT_DTYPES:
        raise TypeError(
            "an array image must be uint8, uint16, or float16/32/64 in [0, 1], "
            f"not {array.dtype}; convert it first"
        )
    channels_fit = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if not channels_fit or 0 in array.shape:
        raise ValueError(
            "an array image must have the shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), "
            f"no side 0, got {array.shape}"
        )
    white = _INTEGER_WHITE.get(native, 1.0)
    rgb, alpha = _split_alpha(unit_planes(array, white, "a float array"))
    is_gray = array.ndim == 2 or array.shape[2] == 1
    kind = ImageKind("np", is_gray, "L" if is_gray else "RGB", array.dtype, array.ndim)
    return DecodedImage(rgb, alpha, kind)


def _decode_tensor(tensor: Tensor) -> DecodedImage:
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
    kind = ImageKind("pt", dtype=tensor.dtype, device=tensor.device)
    return DecodedImage(rgb, None, kind)


def strip_metadata(image: Image.Image | ArrayImage) -> Image.Image | ArrayImage:
    """Return an upright copy that has no metadata but what its colours mean.

    Args:
        image: PIL image of any mode, or an `ArrayImage`.

    Returns:
        An image of the same kind with its ICC profile (and a PNG's gamma), without EXIF, XMP,
        DPI and comments; transparency stays.
    """
    if isinstance(image, ArrayImage):
        return ArrayImage(image.pixels, {k: v for k, v in image.info.items() if k in COLOR_KEYS})
    upright = _load_upright(image)[0]
    bare = upright.copy()
    bare.info = {k: v for k, v in upright.info.items() if k in (*COLOR_KEYS, "transparency")}
    return bare


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


def _checked_result(
    values: Tensor, name: str, channels: int, *, may_be_bytes: bool = False
) -> Tensor:
    is_bytes = may_be_bytes and isinstance(values, Tensor) and values.dtype == torch.uint8
    if not is_bytes and (not isinstance(values, Tensor) or not values.is_floating_point()):
        found = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{name} must be a floating-point tensor, not {found}")
    if values.ndim != 3 or values.shape[0] != channels or values.numel() == 0:
        raise ValueError(f"{name} must be ({channels}, H, W), got {tuple(values.shape)}")
    if is_bytes:
        return values
    values = values.detach().to(torch.float32)
    if not torch.isfinite(values).all():
        raise ValueError(
            f"{name} must be finite, got NaN or infinity; a model in float16 may have overflowed"
        )
    return values.clamp(0, 1)


def _encode_array(rgb: Tensor, alpha: Tensor | None, kind: ImageKind, same_layout: bool) -> Any:
    if alpha is not None:
        rgb = torch.cat([rgb.expand(3, -1, -1), alpha])
    elif not same_layout:
        rgb = rgb.expand(3, -1, -1)
    dtype = kind.dtype if same_layout else np.dtype(np.uint16 if kind.is_16bit else np.uint8)
    array = _to_bands(rgb, dtype)  # [H, W, C]
    return array[..., 0] if array.shape[2] == 1 and kind.ndim == 2 else array


def _encode_pil(rgb: Tensor, alpha: Tensor | None, kind: ImageKind, wide: bool) -> Image.Image:
    if wide and alpha is None and kind.mode in ("I;16", "I", "F"):
        if kind.mode == "F":
            bands = rgb[0].mul(255).cpu().numpy()
        else:
            bands = _to_bands(rgb, np.dtype(np.uint16))[..., 0]
            bands = bands.astype(np.int32) if kind.mode == "I" else bands
    else:
        planes = rgb if alpha is None else torch.cat([rgb, alpha])
        bands = _to_bands(planes, np.dtype(np.uint8))
        bands = bands[..., 0] if bands.shape[2] == 1 else bands
    image = Image.fromarray(bands)
    image.info.update(kind.info)
    return image


def _to_bands(planes: Tensor, dtype: np.dtype) -> np.ndarray:
    """Return planes (C, H, W), in [0, 1] or bytes, as an array (H, W, C) of a dtype."""
    if planes.dtype != torch.uint8:
        planes = _to_integers(planes, dtype)
    return planes.permute(1, 2, 0).contiguous().cpu().numpy().astype(dtype, copy=False)


def _to_integers(planes: Tensor, dtype: np.dtype) -> Tensor:
    white = _INTEGER_WHITE.get(dtype.newbyteorder("="))
    if white is not None:
        planes = planes.mul(white).add_(0.5).floor_()  # half up
    # Before it leaves the device: a quarter of the bytes.
    return planes.byte() if dtype == np.uint8 else planes


def unreadable(name: object, error: Exception) -> ImageReadError:
    """Put what Pillow raised into one sentence about the file."""
    if isinstance(error, UnidentifiedImageError):
        return ImageReadError(f"{name}: must be an image, but is none that Pillow knows")
    if isinstance(error, PermissionError):
        return ImageReadError(f"{name}: must be readable, but permission is denied")
    return ImageReadError(f"{name}: cannot be read as an image ({error}); get an intact copy")
