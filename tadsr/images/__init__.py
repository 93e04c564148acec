"""Images in and out: the only room that knows ranges, alpha, 16 bit, EXIF and ICC."""

from tadsr.config import MAX_PIXELS
from tadsr.images.array_image import ArrayImage
from tadsr.images.canvas import alpha_rows, assemble_images, resize_image, stack_images
from tadsr.images.decoding import (
    DecodedImage,
    ImageKind,
    ImageLike,
    OutputType,
    decode_image,
    lay_over,
    mark_as_made,
    strip_metadata,
)
from tadsr.images.encoding import OUTPUT_TYPES, encode_image, takes_bytes, to_uint8
from tadsr.images.files import check_format, check_writable, is_see_through, write_image
from tadsr.images.frames import Animation, count_frames, read_frames, write_frames
from tadsr.images.metadata import upright_size
from tadsr.images.reading import FileFacts, find_losses, read_facts, read_image
from tadsr.images.strips import STREAMED_SUFFIXES, check_streamable, write_strips
from tadsr.images.tensors import (
    pad_reflect,
    pad_wrap,
    reflect_index,
    resize_bicubic,
    resize_bicubic_rows,
    resize_wrapped,
)
