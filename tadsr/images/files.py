"""Image files: read whole, written whole or not at all."""

from __future__ import annotations

import errno
import functools
import math
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, PngImagePlugin, features

from tadsr.errors import ImageWriteError, install, reason_of
from tadsr.images.array_image import ArrayImage, strips
from tadsr.images.color_space import to_srgb
from tadsr.images.containers import knows_jxl
from tadsr.images.decoding import INTEGER_WHITE, decode_image, icc_space, unit_planes
from tadsr.images.encoding import encode_image
from tadsr.images.metadata import exif_with_dpi, find_orientation, iptc_resource, kept_metadata
from tadsr.images.strips import (
    PngWriter,
    attach_metadata,
    metadata_chunks,
    open_whole,
    write_tiff,
)
from tadsr.whole_file import why_unwritable

# What can be written, if this build of Pillow can.
_SUFFIXES = {
    **{f".{name.lower()}": name for name in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "AVIF", "GIF")},
    **{".apng": "PNG", ".jpg": "JPEG", ".tif": "TIFF", ".jxl": "JXL"},
}
LOSSLESS_FORMATS = ("PNG", "WEBP", "TIFF", "BMP", "JXL")
"""What can be written without loss."""
_OPAQUE_FORMATS = ("JPEG", "BMP")
_ANIMATED_FORMATS = ("PNG", "WEBP", "GIF")
_LARGEST_SIDE_PX = {"JPEG": 65500, "WEBP": 16383, "GIF": 65535, "AVIF": 65536}
_LARGEST_SIDE_PX |= {"PNG": 2**31 - 1, "BMP": 2**31 - 1, "TIFF": 2**32 - 1}
_JPEG_SEGMENT_BYTES = 65533
# What fits the one segment that holds it, or a profile's 255.
_JPEG_BYTES = {"exif": _JPEG_SEGMENT_BYTES, "xmp": 65504, "comment": _JPEG_SEGMENT_BYTES}
_JPEG_BYTES["icc_profile"] = 255 * 65519
_PHOTOSHOP = b"Photoshop 3.0\0"
_GIF_OPAQUE_COLORS = 255
_FILE_MODES = {
    "PNG": ("1", "L", "LA", "I;16", "P", "RGB", "RGBA"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "TIFF": ("1", "L", "LA", "I;16", "I", "F", "P", "RGB", "RGBA", "CMYK"),
    "BMP": ("1", "L", "P", "RGB"),
    "AVIF": ("RGB", "RGBA"),
    "GIF": (),
    "JXL": ("L", "LA", "RGB", "RGBA"),
}


def check_writable(
    path: str | os.PathLike[str],
    *,
    overwrite: bool = True,
    format: str | None = None,
    has_alpha: bool = False,
    size: tuple[int, int] | None = None,
    num_frames: int = 1,
) -> None:
    """Raise unless `write_image` could write such an image; writes nothing.

    Args:
        size: (width, height) in px that the image will have; None skips that check.
    """
    path, format = Path(path), _file_format(Path(path), format)
    if not os.path.isdir(path.parent):
        raise ImageWriteError(f"{path}: its folder must exist, but does not; create it first")
    _check_name_length(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise ImageWriteError(f"{path}: must name a file, but is a folder, pipe or device")
    if reason := why_unwritable(path.parent):
        raise ImageWriteError(f"{path}: cannot be written, for {reason}; choose another folder")
    if os.path.lexists(path) and not overwrite:
        raise ImageWriteError(f"{path}: exists already; overwrite=True (--overwrite) replaces it")
    check_format(path, format=format, has_alpha=has_alpha, size=size, num_frames=num_frames)


def check_format(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    has_alpha: bool = False,
    size: tuple[int, int] | None = None,
    num_frames: int = 1,
) -> None:
    """Raise unless a file's format can hold an image, wherever the file is.

    Args:
        size: (width, height) in px that the image will have; None skips that check.
    """
    path, format = Path(path), _file_format(Path(path), format)
    if num_frames > 1 and format not in _ANIMATED_FORMATS:
        raise ImageWriteError(
            f"{path}: {format} cannot hold an animation of {num_frames} frames; write .png, "
            ".webp or .gif, or save the frame that you want by itself first"
        )
    if has_alpha and format in _OPAQUE_FORMATS:
        raise ImageWriteError(
            f"{path}: {format} cannot hold an alpha channel; write PNG or WebP, or lay it over a "
            "colour (--background)"
        )
    limit = _LARGEST_SIDE_PX.get(format, math.inf)
    if size and max(size) > limit:
        raise ImageWriteError(
            f"{path}: the result would have {size[0]}×{size[1]} px, but {format} holds at most "
            f"{limit} px a side; use a smaller scale{'' if format == 'PNG' else ', or write PNG'}"
        )


def _check_name_length(path: Path) -> None:
    try:
        os.lstat(path)  # only the file system knows what it takes
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ImageWriteError(
                f"{path}: its name must be one that the file system takes, but has "
                f"{len(os.fsencode(path.name))} bytes; choose a shorter one"
            ) from None


def write_image(
    image: Image.Image | ArrayImage,
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    quality: int | None = None,
    is_lossless: bool = False,
    overwrite: bool = True,
) -> None:
    """Write an image file whole or not at all.

    ICC profile, EXIF, XMP and dpi are kept where the format has a place for them: BMP for dpi
    alone, GIF for none, JPEG for EXIF and XMP of up to 64 kB each, others for all. Texts are kept
    in PNG, IPTC in PNG, JPEG and TIFF, comments in PNG, JPEG and GIF. PNG holds up to 16 bit,
    TIFF float too; elsewhere 16 bit are rounded to 8, and GIF has 256 colours.

    Args:
        image: PIL image of any mode, or an `ArrayImage`.
        path: The file; its suffix chooses the format.
        format: "PNG", "JPEG", "WebP", "TIFF", "BMP", "AVIF" or "GIF", in place of the suffix's.
        quality: 1 (small) to 100; None for 95 in JPEG, 90 in WebP and AVIF; others ignore it.
        is_lossless: Whether WebP loses nothing, in place of a quality.
        overwrite: Whether an existing file may be replaced.

    Raises:
        TypeError: If `image` is not a PIL image or `quality` not an int.
        ValueError: If `quality` is not in 1..100, or a mode I or F image that the format cannot
            hold is outside 0..65535 or 0..255.
        ImageWriteError: If `check_writable` says so, or writing fails, which leaves any existing
            file as it was.
    """
    if not isinstance(image, Image.Image | ArrayImage):
        raise TypeError(
            f"image must be a PIL image or an ArrayImage, not {type(image).__name__}; "
            "encode_image(..., output_type='pil') gives one"
        )
    if quality is not None and (isinstance(quality, bool) or not isinstance(quality, int)):
        raise TypeError(f"quality must be an int from 1 to 100, not {type(quality).__name__}")
    if quality is not None and not 1 <= quality <= 100:
        raise ValueError(f"quality must be from 1 to 100, got {quality}")
    check_writable(
        path, overwrite=overwrite, format=format, has_alpha=is_see_through(image), size=image.size
    )
    format = _file_format(Path(path), format)
    if is_lossless and format not in LOSSLESS_FORMATS:
        raise ValueError(f"lossless must be for {', '.join(LOSSLESS_FORMATS)}, got {format}")
    image = _fit_mode(image, format)
    with open_whole(path) as file:
        try:
            if isinstance(image, ArrayImage):
                _write_array(image, file, format)
            else:
                options = save_options(image, format, quality, is_lossless=is_lossless)
                image.save(file, format=format, **options)
                if format == "TIFF":
                    attach_metadata(file, kept_metadata(image.info, icc_space(image.mode)))
        except Exception as error:
            raise ImageWriteError(
                f"{path}: cannot be written as {format}: {reason_of(error)}"
            ) from error


def to_palette(image: Image.Image) -> Image.Image:
    """Reduce an image to a palette with dithering, as a GIF needs it."""
    colors = image.convert("RGB")
    palette = colors.quantize(_GIF_OPAQUE_COLORS)
    entries = palette.getpalette()[: 3 * _GIF_OPAQUE_COLORS]
    # Filled up by the first colour, so that the last entry can be told apart from every colour.
    entries = (entries + entries[:3] * 256)[: 3 * 256]
    palette.putpalette(entries)
    indices = np.array(colors.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG))
    indices[indices == _GIF_OPAQUE_COLORS] = 0
    is_transparent = image.has_transparency_data
    if is_transparent:
        indices[np.asarray(image.convert("RGBA"))[..., 3] < 128] = _GIF_OPAQUE_COLORS
    reduced = Image.fromarray(indices)
    reduced.putpalette(entries)
    if is_transparent:
        reduced.info["transparency"] = _GIF_OPAQUE_COLORS
    return reduced


def _write_array(image: ArrayImage, file: BinaryIO, format: str) -> None:
    metadata = kept_metadata(image.info, b"GRAY" if image.is_gray else b"RGB ")
    pixels = image.pixels
    if format == "TIFF":
        write_tiff(file, [pixels], pixels.shape, pixels.dtype, metadata)
        return
    if pixels.dtype.kind == "f":
        pixels = np.floor(pixels * 65535 + 0.5).astype(np.uint16)
    PngWriter(file, pixels.shape, pixels.dtype, metadata).write_image([pixels])


@functools.cache
def _writable_suffixes() -> dict[str, str]:
    Image.init()
    knows_jxl()
    return {suffix: name for suffix, name in _SUFFIXES.items() if name in Image.SAVE}


def _file_format(path: Path, format: str | None) -> str:
    suffix = path.suffix if format is None else f".{format}"
    found = _writable_suffixes().get(suffix.lower())
    if found is None:
        known = " ".join(_writable_suffixes())
        if suffix.lower() in _SUFFIXES:
            if suffix.lower() == ".jxl":
                raise ImageWriteError(
                    f"{path}: JPEG XL needs the library pillow-jxl-plugin; {install('jxl')}"
                )
            raise ImageWriteError(
                f"{path}: this build of Pillow cannot write {_SUFFIXES[suffix.lower()]}, which "
                f"pip's can: pip install -U pillow; or use one of {known}"
            )
        raise ImageWriteError(f"{path}: cannot write {suffix or 'no suffix'!r}; use one of {known}")
    return found


def _fit_mode(image: Image.Image | ArrayImage, format: str) -> Image.Image | ArrayImage:
    modes = _FILE_MODES[format]
    if isinstance(image, ArrayImage):
        if format in ("PNG", "TIFF"):
            return image
        decoded = decode_image(image)
        image = encode_image(decoded.rgb, decoded.alpha, decoded, "pil")
    if image.mode == "F" and format == "TIFF":
        # In files white is 1, unlike in Pillow's mode F.
        planes = unit_planes(np.asarray(image), 255.0, "an image of mode F")
        return ArrayImage(planes.permute(1, 2, 0).numpy(), dict(image.info))
    if format == "GIF":
        decoded = decode_image(image)
        reduced = to_palette(encode_image(decoded.rgb, decoded.alpha, decoded, "pil"))
        reduced.info |= {key: v for key, v in decoded.kind.info.items() if key == "comment"}
        return reduced
    if format == "JXL":  # has no place for a profile, and EXIF's orientation does not count
        if find_orientation(image) != 1:
            decoded = decode_image(image)
            image = encode_image(decoded.rgb, decoded.alpha, decoded, "pil")
        image = _in_srgb(image)
    if image.mode == "I" and "I;16" in modes and "I" not in modes:
        bands = np.asarray(image)
        unit_planes(bands, 65535.0, "an image of mode I")  # checks the range
        narrow = Image.fromarray(bands.astype(np.uint16))
        narrow.info = dict(image.info)
        return narrow
    # Only PNG writes a transparent colour or palette entry; others need an alpha channel.
    keyed = format != "PNG" and image.has_transparency_data and image.mode[-1] not in "Aa"
    if image.mode in modes and not keyed:
        return image
    decoded = decode_image(image)
    image = encode_image(decoded.rgb, decoded.alpha, decoded, "pil")
    if image.mode in modes:
        return image
    is_opaque = decoded.alpha is None or format in _OPAQUE_FORMATS
    return image.convert("RGB" if is_opaque else "RGBA")


def _in_srgb(image: Image.Image) -> Image.Image:
    """Convert an image that has a profile, for a format that is written without."""
    kept = kept_metadata(image.info, icc_space(image.mode))
    profile = kept.pop("icc_profile", None)
    if profile is None:
        return image
    converted = Image.fromarray(to_srgb(np.asarray(image.convert("RGB")), profile))
    if image.has_transparency_data:
        converted.putalpha(image.convert("RGBA").getchannel("A"))
    converted.info = kept
    return converted


def is_see_through(image: Image.Image | ArrayImage) -> bool:
    """Tell whether an image has an alpha channel that is not opaque everywhere."""
    if not image.has_transparency_data:
        return False
    if isinstance(image, ArrayImage):
        return image.pixels[..., -1].min() < INTEGER_WHITE.get(image.pixels.dtype, 1)
    if image.mode in ("LA", "La", "RGBA", "RGBa", "PA"):
        return image.getchannel(len(image.getbands()) - 1).getextrema()[0] < 255
    # A palette or one value that is transparent: all at once it would be four times as large.
    return any(
        strip.convert("RGBA").getchannel("A").getextrema()[0] < 255 for _, strip in strips(image)
    )


def save_options(
    image: Image.Image, format: str, quality: int | None, *, is_lossless: bool = False
) -> dict[str, Any]:
    """Return what Pillow's saver of a format is told: quality and metadata."""
    # icc_profile=None overrules savers that look into image.info by themselves.
    options = {"icc_profile": None, **kept_metadata(image.info, icc_space(image.mode))}
    told = {key: options.pop(key, None) for key in ("text", "comment", "iptc", "cicp")}
    if format in ("JPEG", "GIF") and told["comment"]:
        options["comment"] = told["comment"]
    if format == "JPEG":
        iptc = _PHOTOSHOP + iptc_resource(told["iptc"] or b"")
        if told["iptc"] and len(iptc) <= _JPEG_SEGMENT_BYTES:
            options["extra"] = b"\xff\xed" + (len(iptc) + 2).to_bytes(2, "big") + iptc
        options |= {"quality": quality or 95, "subsampling": 0}
        for key, limit in _JPEG_BYTES.items():
            if len(options.get(key) or b"") > limit:
                options[key] = b""
    elif format in ("WEBP", "AVIF", "JXL"):
        options["quality"] = quality or 90
        if is_lossless:
            options |= {"lossless": True, "quality": 100 if quality is None else quality}
        if "dpi" in options:
            options["exif"] = exif_with_dpi(options.get("exif"), options["dpi"])
        if format == "JXL":
            # Pillow's plugin would pack up the JPEG that an image was read from, and its EXIF.
            options |= {"lossless_jpeg": False, "exif": options.get("exif", b"")}
    elif format == "PNG":
        # Only what Pillow's saver would not write by itself.
        chunks = PngImagePlugin.PngInfo()
        own = told | {"xmp": options.get("xmp")}
        for kind, data in metadata_chunks({key: value for key, value in own.items() if value}):
            chunks.add(kind, data)
        options |= {"compress_level": 4, "pnginfo": chunks}
    elif format == "TIFF":
        if features.check_codec("libtiff"):
            options["compression"] = "tiff_lzw"
        # EXIF is put in afterwards: Pillow's saver fails at parts of it.
        options.pop("exif", None)
    return options
