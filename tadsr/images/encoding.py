"""Float tensors, or bytes, back to the kind of image that was decoded, whole or in strips."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tadsr.config import UpscaleSettings
from tadsr.images.array_image import ArrayImage
from tadsr.images.decoding import (
    INTEGER_WHITE,
    DecodedImage,
    ImageKind,
    ImageLike,
    OutputType,
    decode_image,
)
from tadsr.images.tensors import resize_bicubic, resize_bicubic_rows, resize_wrapped

OUTPUT_TYPES = ("pil", "np", "pt")
_LUMA_BT601 = (0.299, 0.587, 0.114)


def encode_image(
    rgb: Tensor, alpha: Tensor | None, like: DecodedImage, output_type: OutputType | None = None
) -> ImageLike:
    """Turn tensors back into the kind of image that was decoded.

    Grey stays grey, also in three channels, by BT.601 luma. PIL modes come back as they were,
    except 1 as L; P and the colour spaces as RGB; premultiplied as plain alpha; and 16-bit grey
    with alpha, which Pillow has no mode for, as 8-bit LA. Integers are rounded half up.

    Args:
        rgb: Float (3, H, W), clamped to [0, 1]; H and W may differ from those decoded. Or bytes,
            where `takes_bytes`.
        alpha: Float (1, H, W), clamped to [0, 1], attached as it is; None for an opaque result.
        output_type: None for that kind; "pil" for an 8-bit PIL image; "np" for an array
            (H, W, 3), or (H, W, 4) with alpha, of uint8, or uint16 if the input was 16 bit;
            "pt" for a float32 tensor (3, H, W) in [0, 1], without alpha.
    """
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
    if kind.is_gray or kind.is_colorless:
        weights = rgb.new_tensor(_LUMA_BT601).view(3, 1, 1)
        rgb = (rgb * weights).sum(dim=0, keepdim=True).clamp_(0, 1)  # [1, H, W]
        rgb = rgb if kind.is_gray else rgb.expand(3, -1, -1)
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
    """Return whether `encode_image` can do with bytes: the result has three colours of 8 bit.

    Raises:
        ValueError: There is no such output_type.
    """
    if output_type is not None and output_type not in OUTPUT_TYPES:
        choices = ", ".join(map(repr, OUTPUT_TYPES))
        raise ValueError(f"output_type must be None, {choices}; got {output_type!r}")
    kind = like.kind
    container = output_type or kind.container
    is_8bit = container == "pil"
    if container == "np":
        is_8bit = kind.dtype == np.uint8 if output_type is None else not kind.is_16bit
    return is_8bit and not (kind.is_gray or kind.is_colorless)


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


def to_uint8(rgb: Tensor) -> np.ndarray:
    """Turn (3, H, W) in about [0, 1] into uint8 (H, W, 3), rounded as image files are."""
    return _to_bands(rgb.float().clamp(0, 1), np.dtype(np.uint8))


def _to_bands(planes: Tensor, dtype: np.dtype) -> np.ndarray:
    """Return planes (C, H, W), in [0, 1] or bytes, as an array (H, W, C) of a dtype."""
    if planes.dtype != torch.uint8:
        planes = _to_integers(planes, dtype)
    return planes.permute(1, 2, 0).contiguous().cpu().numpy().astype(dtype, copy=False)


def _to_integers(planes: Tensor, dtype: np.dtype) -> Tensor:
    white = INTEGER_WHITE.get(dtype.newbyteorder("="))
    if white is not None:
        planes = planes.mul(white).add_(0.5).floor_()  # half up
    # Before it leaves the device: a quarter of the bytes.
    return planes.byte() if dtype == np.uint8 else planes


def assemble_images(
    strips: Iterable[tuple[int, Tensor]],
    decoded: Sequence[DecodedImage],
    settings: UpscaleSettings,
    output_type: OutputType | None = None,
) -> list[ImageLike]:
    """Put strips together to images of the kinds that were decoded.

    Args:
        strips: Of B images, from top to bottom: the first row, and (B, 3, rows, W) as for
            `encode_image`.
    """
    size = settings.output_size(*decoded[0].rgb.shape[-2:])
    images: list[ImageLike | None] = [None] * len(decoded)
    for start, strip in strips:
        for number, (like, colors) in enumerate(zip(decoded, strip, strict=True)):
            alpha = alpha_rows(like, settings, start, colors)
            encoded = encode_image(colors, alpha, like, output_type)
            images[number] = _put(images[number], encoded, start, size)
    return images


def stack_images(decoded: Sequence[DecodedImage]) -> Tensor:
    """Stack images of one size, (B, 3, H, W) in [0, 1], or (B, 4, H, W) where any has alpha."""
    if all(image.alpha is None for image in decoded):
        return torch.stack([image.rgb for image in decoded])
    opaque = torch.ones_like(decoded[0].rgb[:1])
    alphas = (opaque if image.alpha is None else image.alpha for image in decoded)
    pairs = zip(decoded, alphas, strict=True)
    return torch.stack([torch.cat([image.rgb, alpha]) for image, alpha in pairs])


def alpha_rows(
    decoded: DecodedImage, settings: UpscaleSettings, start: int, colors: Tensor
) -> Tensor | None:
    """Enlarge the alpha channel beside a strip of colours, (1, rows, W) in [0, 1]."""
    if decoded.alpha is None:
        return None
    size = settings.output_size(*decoded.alpha.shape[-2:])
    stop = start + colors.shape[-2]
    if settings.seamless is not None:
        whole = resize_wrapped(decoded.alpha[None], size, settings.wraps)
        return whole[0, :, start:stop].clamp(0, 1)
    return resize_bicubic_rows(decoded.alpha[None], size, start, stop)[0].clamp(0, 1)


def _put(image: ImageLike | None, strip: ImageLike, start: int, size: tuple[int, int]) -> ImageLike:
    """Put a strip into an image of a height and width from a row on; the first one begins it."""
    height, width = size
    if isinstance(strip, Image.Image):
        if strip.size == (width, height):
            return strip
        if image is None:
            image = Image.new(strip.mode, (width, height))
            image.info = strip.info
        image.paste(strip, (0, start))
    elif isinstance(strip, ArrayImage):
        pixels = _put(None if image is None else image.pixels, strip.pixels, start, size)
        return ArrayImage(pixels, strip.info)
    elif isinstance(strip, np.ndarray):
        if image is None:
            # Not the strip, also of all rows: it may be in pinned memory.
            image = np.empty((height, width, *strip.shape[2:]), strip.dtype)
        image[start : start + len(strip)] = strip
    else:
        if image is None:
            image = torch.empty((3, height, width), dtype=strip.dtype).to(strip.device)
        image[:, start : start + strip.shape[1]] = strip
    return image


def resize_image(
    image: Image.Image | ArrayImage, size: tuple[int, int]
) -> Image.Image | ArrayImage:
    """Resize an image by bicubic."""
    decoded = decode_image(image)
    planes = resize_bicubic(stack_images([decoded]), size[::-1])[0].clamp(0, 1)
    return encode_image(planes[:3], planes[3:] if len(planes) == 4 else None, decoded)
