"""Images in and out: the only room that knows ranges, alpha, 16 bit, EXIF and ICC."""

from tadsr.image_io.codec import (
    OUTPUT_TYPES,
    DecodedImage,
    ImageKind,
    ImageLike,
    OutputType,
    decode_image,
    encode_image,
)
from tadsr.image_io.files import MAX_PIXELS, check_writable, read_image, write_image
from tadsr.image_io.tensors import pad_reflect, resize_bicubic

__all__ = [
    "MAX_PIXELS",
    "OUTPUT_TYPES",
    "DecodedImage",
    "ImageKind",
    "ImageLike",
    "OutputType",
    "check_writable",
    "decode_image",
    "encode_image",
    "pad_reflect",
    "read_image",
    "resize_bicubic",
    "write_image",
]
