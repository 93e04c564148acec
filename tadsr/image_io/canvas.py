"""An image that is put together from strips."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tadsr.image_io.array_image import ArrayImage
from tadsr.image_io.codec import DecodedImage, ImageLike, OutputType, encode_image


class StripCanvas:
    """Takes strips as float tensors and gives back the kind of image that was decoded.

    Args:
        like: The decoded image whose kind to give back.
        size: Height and width in px.
        output_type: As for `encode_image`.
    """

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
            start: Its first row.
            rgb: Float (3, rows, W) in [0, 1].
            alpha: Float (1, rows, W) in [0, 1]; None for an opaque image.
        """
        strip = encode_image(rgb, alpha, self._like, self._output_type)
        height, width = self._size
        if isinstance(strip, Image.Image):
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
