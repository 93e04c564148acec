"""Images in and out: the only room that knows ranges, alpha, 16 bit, EXIF and ICC."""

from tadsr.image_io.canvas import StripCanvas
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
from tadsr.image_io.strips import STREAMED_SUFFIXES, check_streamable, write_strips
from tadsr.image_io.tensors import (
    pad_reflect,
    reflect_index,
    resize_bicubic,
    resize_bicubic_rows,
)

__all__ = [
    "MAX_PIXELS",
    "OUTPUT_TYPES",
    "STREAMED_SUFFIXES",
    "DecodedImage",
    "ImageKind",
    "ImageLike",
    "OutputType",
    "StripCanvas",
    "check_streamable",
    "check_writable",
    "decode_image",
    "encode_image",
    "pad_reflect",
    "read_image",
    "reflect_index",
    "resize_bicubic",
    "resize_bicubic_rows",
    "write_image",
    "write_strips",
]
