"""Images that are put together from strips."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tadsr.config import UpscaleSettings
from tadsr.images.array_image import ArrayImage
from tadsr.images.decoding import DecodedImage, ImageLike, OutputType, decode_image
from tadsr.images.encoding import encode_image
from tadsr.images.tensors import resize_bicubic, resize_bicubic_rows, resize_wrapped


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
        if image is None:
            shape = (height, width, strip.pixels.shape[2])
            image = ArrayImage(np.empty(shape, strip.pixels.dtype), strip.info)
        image.pixels[start : start + strip.height] = strip.pixels
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
