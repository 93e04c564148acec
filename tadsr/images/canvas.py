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
            `StripCanvas.write`.
    """
    size = settings.output_size(*decoded[0].rgb.shape[-2:])
    canvases = [StripCanvas(image, size, output_type) for image in decoded]
    for start, strip in strips:
        for canvas, image, colors in zip(canvases, decoded, strip, strict=True):
            canvas.write(start, colors, alpha_rows(image, settings, start, colors))
    return [canvas.image for canvas in canvases]


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


class StripCanvas:
    """Takes strips as tensors and gives back the kind of image that was decoded."""

    def __init__(
        self, like: DecodedImage, size: tuple[int, int], output_type: OutputType | None = None
    ) -> None:
        self._like = like
        self._size = size
        self._output_type = output_type
        self._image: ImageLike | None = None

    def write(self, start: int, rgb: Tensor, alpha: Tensor | None = None) -> None:
        """Put a strip in its place.

        Args:
            rgb: (3, rows, W), as for `encode_image`.
            alpha: Float (1, rows, W) in [0, 1]; None for an opaque image.
        """
        strip = encode_image(rgb, alpha, self._like, self._output_type)
        height, width = self._size
        if isinstance(strip, Image.Image):
            if strip.size == (width, height):
                self._image = strip
                return
            if self._image is None:
                self._image = Image.new(strip.mode, (width, height))
                self._image.info = strip.info
            self._image.paste(strip, (0, start))
        elif isinstance(strip, ArrayImage):
            if self._image is None:
                shape = (height, width, strip.pixels.shape[2])
                self._image = ArrayImage(np.empty(shape, strip.pixels.dtype), strip.info)
            self._image.pixels[start : start + strip.height] = strip.pixels
        elif isinstance(strip, np.ndarray):
            if self._image is None:
                # Not the strip, also of all rows: it may be in pinned memory.
                self._image = np.empty((height, width, *strip.shape[2:]), strip.dtype)
            self._image[start : start + len(strip)] = strip
        else:
            if self._image is None:
                self._image = torch.empty((3, height, width), dtype=strip.dtype).to(strip.device)
            self._image[:, start : start + strip.shape[1]] = strip

    @property
    def image(self) -> ImageLike:
        """The image, once all strips are there."""
        return self._image


def resize_image(
    image: Image.Image | ArrayImage, size: tuple[int, int]
) -> Image.Image | ArrayImage:
    """Resize an image by bicubic."""
    decoded = decode_image(image)
    planes = resize_bicubic(stack_images([decoded]), size[::-1])[0].clamp(0, 1)
    return encode_image(planes[:3], planes[3:] if len(planes) == 4 else None, decoded)
