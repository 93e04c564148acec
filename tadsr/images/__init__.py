"""Images in and out: the only room that knows ranges, alpha, 16 bit, EXIF and ICC."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tadsr.lazily import lazy_names

if TYPE_CHECKING:
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

# A command that looks at a file's header here imports no torch.
__getattr__ = lazy_names(
    __name__,
    {
        "Animation": "tadsr.images.frames",
        "ArrayImage": "tadsr.images.array_image",
        "DecodedImage": "tadsr.images.decoding",
        "FileFacts": "tadsr.images.reading",
        "ImageKind": "tadsr.images.decoding",
        "ImageLike": "tadsr.images.decoding",
        "MAX_PIXELS": "tadsr.config",
        "OUTPUT_TYPES": "tadsr.images.encoding",
        "OutputType": "tadsr.images.decoding",
        "STREAMED_SUFFIXES": "tadsr.images.strips",
        "alpha_rows": "tadsr.images.canvas",
        "assemble_images": "tadsr.images.canvas",
        "check_format": "tadsr.images.files",
        "check_streamable": "tadsr.images.strips",
        "check_writable": "tadsr.images.files",
        "count_frames": "tadsr.images.frames",
        "decode_image": "tadsr.images.decoding",
        "encode_image": "tadsr.images.encoding",
        "find_losses": "tadsr.images.reading",
        "is_see_through": "tadsr.images.files",
        "lay_over": "tadsr.images.decoding",
        "mark_as_made": "tadsr.images.decoding",
        "pad_reflect": "tadsr.images.tensors",
        "pad_wrap": "tadsr.images.tensors",
        "read_facts": "tadsr.images.reading",
        "read_frames": "tadsr.images.frames",
        "read_image": "tadsr.images.reading",
        "reflect_index": "tadsr.images.tensors",
        "resize_bicubic": "tadsr.images.tensors",
        "resize_bicubic_rows": "tadsr.images.tensors",
        "resize_image": "tadsr.images.canvas",
        "resize_wrapped": "tadsr.images.tensors",
        "stack_images": "tadsr.images.canvas",
        "strip_metadata": "tadsr.images.decoding",
        "takes_bytes": "tadsr.images.encoding",
        "to_uint8": "tadsr.images.encoding",
        "upright_size": "tadsr.images.metadata",
        "write_frames": "tadsr.images.frames",
        "write_image": "tadsr.images.files",
        "write_strips": "tadsr.images.strips",
    },
)
