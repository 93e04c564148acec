"""Images in and out: the only room that knows ranges, alpha, 16 bit, EXIF and ICC."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tadsr.lazily import lazy_names

if TYPE_CHECKING:
    from tadsr.config import MAX_PIXELS
    from tadsr.images.array_image import ArrayImage
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
    from tadsr.images.encoding import (
        OUTPUT_TYPES,
        alpha_rows,
        assemble_images,
        encode_image,
        resize_image,
        stack_images,
        takes_bytes,
        to_uint8,
    )
    from tadsr.images.files import check_format, check_writable, is_see_through, write_image
    from tadsr.images.frames import Animation, read_frames, write_frames
    from tadsr.images.metadata import upright_size
    from tadsr.images.reading import FileFacts, count_frames, find_losses, read_facts, read_image
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
        "tadsr.config": "MAX_PIXELS",
        "tadsr.images.array_image": "ArrayImage",
        "tadsr.images.decoding": (
            "DecodedImage ImageKind ImageLike OutputType decode_image lay_over mark_as_made "
            "strip_metadata"
        ),
        "tadsr.images.encoding": (
            "OUTPUT_TYPES alpha_rows assemble_images encode_image resize_image stack_images "
            "takes_bytes to_uint8"
        ),
        "tadsr.images.files": "check_format check_writable is_see_through write_image",
        "tadsr.images.frames": "Animation read_frames write_frames",
        "tadsr.images.metadata": "upright_size",
        "tadsr.images.reading": "FileFacts count_frames find_losses read_facts read_image",
        "tadsr.images.strips": "STREAMED_SUFFIXES check_streamable write_strips",
        "tadsr.images.tensors": (
            "pad_reflect pad_wrap reflect_index resize_bicubic resize_bicubic_rows resize_wrapped"
        ),
    },
)
