"""EXIF, ICC, texts and more: what stays true for an image that is upright and enlarged."""

from __future__ import annotations

import re
from collections.abc import Mapping
from numbers import Real
from typing import Any

from PIL import ExifTags, Image

from tadsr.images.color_space import profile_of_gamma
from tadsr.version import __version__

COLOR_KEYS = ("icc_profile", "srgb", "gamma", "chromaticity", "cicp")
"""Metadata that says what the pixels' values mean."""

_INCH_CM = 2.54
_MAX_DPI = 65535  # all that JPEG has room for; more is damage, and BMP cannot write it
_ORIENTATIONS_ON_THE_SIDE = (5, 6, 7, 8)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_IPTC_TAG = 33723
_IPTC_RESOURCE = 0x0404
# Metadata in a text's form, which is carried as what it is; or of the old size.
_STALE_TEXTS = re.compile(r"XML:com\.adobe\.xmp|Raw profile type .*|Thumb::.*", re.IGNORECASE)
_RAW_IPTC = "Raw profile type iptc"
_SHAPE_DESCRIPTION = '{"shape"'  # where tifffile repeats the size
STORAGE_TAGS = frozenset(
    {254, 255, *range(256, 260), 262, 263, 264, 265, 266, 273, 277, 278, 279, 280, 281, 284}
    | {288, 289, 290, 291, 292, 293, 297, 301, 317, 318, 319, 320, 321, 322, 323, 324, 325, 330}
    | {332, 334, 336, 338, 339, 340, 341, 342, 347, *range(512, 522), *range(529, 533), 700}
    | {33723, 34377, 34675, 37724}
)
"""Tags of TIFF that say how pixels are stored, or hold them: a result has its own."""

_XMP_ORIENTATION = re.compile(rb"""(tiff:Orientation(?:=["']|>))\s*[0-9]\s*(?=["'<])""")
_XMP_STALE = re.compile(
    rb"""\s(?:tiff:Image(?:Width|Length)|exif:Pixel[XY]Dimension)=(?:"[^"]*"|'[^']*')"""
    # No second beginning within, or a packet of many beginnings would be searched for hours.
    rb"""|<(tiff:Image(?:Width|Length)|exif:Pixel[XY]Dimension|xmp:Thumbnails)>(?:(?!<\1>).)*?</\1>""",
    re.DOTALL,
)


def kept_metadata(info: Mapping[str, Any], icc_space: bytes) -> dict[str, Any]:
    """Keep the metadata that is well-formed and fits the colour space.

    Returns:
        Of `icc_profile`, `exif`, `dpi`, `xmp`, `cicp` (four bytes), `text` (a PNG's, by keyword),
        `comment` and `iptc` (bytes) those that are there. A PNG's gamma becomes a profile.
    """
    kept: dict[str, Any] = {}
    profile, exif, dpi = (info.get(key) for key in ("icc_profile", "exif", "dpi"))
    gamma, chromaticity = (info.get(key) for key in ("gamma", "chromaticity"))
    is_told_otherwise = isinstance(profile, bytes) or "srgb" in info  # which says more
    if not is_told_otherwise and (gamma or chromaticity):
        profile = profile_of_gamma(gamma, chromaticity, icc_space)
    if isinstance(profile, bytes) and profile[16:20] == icc_space:
        kept["icc_profile"] = profile
    if isinstance(text := info.get("text"), Mapping):
        kept["text"] = {key: value for key, value in text.items() if not _STALE_TEXTS.match(key)}
    for key in ("cicp", "comment", "iptc"):
        if isinstance(value := info.get(key), bytes) and value:
            kept[key] = value
    if isinstance(exif, bytes) and _is_sound(exif):
        kept["exif"] = exif
    if isinstance(dpi, tuple) and len(dpi) == 2 and all(isinstance(v, Real) for v in dpi):
        dpi = tuple(float(value) for value in dpi)
        # Pillow says 1 for a TIFF that says nothing.
        if all(0 < value <= _MAX_DPI for value in dpi) and dpi != (1, 1):
            kept["dpi"] = dpi
    xmp = info.get("xmp") or info.get("XML:com.adobe.xmp")
    if xmp := tidy_xmp(xmp.encode() if isinstance(xmp, str) else xmp):
        kept["xmp"] = xmp
    return {key: value for key, value in kept.items() if value}


def find_metadata(image: Image.Image) -> dict[str, Any]:
    """Return a loaded PIL image's `info`, with what Pillow keeps elsewhere under one name each."""
    found = dict(image.info)
    text = getattr(image, "text", None)
    if isinstance(text, dict):
        found["text"] = dict(text)
        found["iptc"] = _unhex(text.get(_RAW_IPTC))
    resources = found.get("photoshop")
    if isinstance(resources, dict) and isinstance(resources.get(_IPTC_RESOURCE), bytes):
        found["iptc"] = resources[_IPTC_RESOURCE]
    value = getattr(image, "tag_v2", {}).get(_IPTC_TAG)
    if isinstance(value, tuple) and all(isinstance(each, int) for each in value):
        # Some programs name bytes a list of longs.
        value = b"".join((each % 2**32).to_bytes(4, "little") for each in value)
    if isinstance(value, bytes):
        found["iptc"] = value
    return found


def _unhex(text: Any) -> bytes | None:
    """Return the IPTC in a PNG's raw profile: hexadecimal digits after a name and a length."""
    try:
        data = bytes.fromhex("".join(str(text).split()[2:]))
    except ValueError:
        return None
    resource = data.find(b"8BIM" + _IPTC_RESOURCE.to_bytes(2, "big"))
    if resource < 0:
        return data
    start = resource + 6 + (data[resource + 6] // 2 + 1) * 2
    return data[start + 4 : start + 4 + int.from_bytes(data[start : start + 4], "big")]


def iptc_resource(iptc: bytes) -> bytes:
    """Return IPTC as the resource of Photoshop's that JPEG and PNG hold it in."""
    head = b"8BIM" + _IPTC_RESOURCE.to_bytes(2, "big") + bytes(2)
    return head + len(iptc).to_bytes(4, "big") + iptc + bytes(len(iptc) % 2)


def upright_metadata(exif: Image.Exif, info: Mapping[str, Any], icc_space: bytes) -> dict[str, Any]:
    """Keep the metadata of a file whose pixels are turned upright."""
    try:
        found = {"dpi": exif_dpi(exif)} | info | {"exif": tidy_exif(exif)}
    except Exception:  # damaged EXIF says nothing against the pixels
        found = info | {"exif": None}
    return kept_metadata(found, icc_space)


def read_exif(image: Image.Image) -> Image.Exif:
    """Return the EXIF of a PIL image, empty where it is damaged."""
    try:
        return image.getexif()
    except Exception:  # it makes Pillow raise nearly anything
        return Image.Exif()


def turn_upright(image: Image.Image, orientation: int | None = None) -> Image.Image:
    """Return a loaded copy of a PIL image, turned by its EXIF orientation.

    Unlike Pillow's `exif_transpose` it leaves the metadata as it was, so that damage to the rest
    of the EXIF does not matter.
    """
    image.load()
    turn = _TURNS.get(find_orientation(image) if orientation is None else orientation)
    return image.copy() if turn is None else image.transpose(turn)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return the width and height in px that a PIL image has once it is turned upright."""
    width, height = image.size
    is_on_its_side = find_orientation(image) in _ORIENTATIONS_ON_THE_SIDE
    return (height, width) if is_on_its_side else (width, height)


def find_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of a PIL image, 1 for upright or unknown."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF says nothing against the pixels
        return 1


def mark_exif(exif: Image.Exif) -> bytes:
    """Say in EXIF that tadsr has processed the picture, beside what the camera says."""
    exif[ExifTags.Base.ProcessingSoftware] = f"tadsr {__version__}"
    return exif.tobytes()


def is_marked(exif: Image.Exif) -> bool:
    """Tell whether EXIF says that tadsr has processed the picture."""
    return str(exif.get(ExifTags.Base.ProcessingSoftware, "")).startswith("tadsr ")


def _is_sound(exif: bytes) -> bool:
    found = Image.Exif()
    try:
        found.load(exif)
        return len(found) > 0 and bool(found.tobytes())
    except Exception:  # damaged EXIF makes Pillow raise nearly anything
        return False


def tidy_exif(exif: Image.Exif) -> bytes | None:
    """Serialise the EXIF of an image that has been turned upright and will change its size.

    An orientation becomes 1; sizes, thumbnails and how a TIFF stores its pixels go.
    """
    tidy = Image.Exif()
    tidy.endian = exif.endian
    for tag in exif:
        if tag not in STORAGE_TAGS:
            tidy[tag] = exif[tag]
    if str(tidy.get(ExifTags.Base.ImageDescription, "")).startswith(_SHAPE_DESCRIPTION):
        del tidy[ExifTags.Base.ImageDescription]
    if ExifTags.Base.Orientation in tidy:
        tidy[ExifTags.Base.Orientation] = 1
    if ExifTags.IFD.GPSInfo in tidy:
        tidy[ExifTags.IFD.GPSInfo] = dict(exif.get_ifd(ExifTags.IFD.GPSInfo))
    if ExifTags.IFD.Exif in tidy:
        photo = dict(exif.get_ifd(ExifTags.IFD.Exif))
        for tag in (ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight):
            photo.pop(tag, None)
        if ExifTags.IFD.Interop in photo:
            photo[ExifTags.IFD.Interop] = dict(exif.get_ifd(ExifTags.IFD.Interop))
        tidy[ExifTags.IFD.Exif] = photo
    # The thumbnail's directory is not among them.
    return tidy.tobytes() if len(tidy) else None


def tidy_xmp(packet: Any) -> bytes | None:
    """Return an XMP packet with orientation 1 if any, without sizes and thumbnails.

    A packet that is not UTF-8, as all formats want it, is None: its orientation may be wrong.
    """
    if not isinstance(packet, bytes) or not packet.strip(b"\0 \r\n"):
        return None
    try:
        packet.decode()
    except UnicodeDecodeError:
        return None
    return _XMP_STALE.sub(b"", _XMP_ORIENTATION.sub(rb"\g<1>1", packet))


def exif_dpi(exif: Image.Exif) -> tuple[float, float] | None:
    """Return the resolution that EXIF tells, horizontal and vertical, or None."""
    base = ExifTags.Base
    unit = {2: 1.0, 3: _INCH_CM}.get(exif.get(base.ResolutionUnit, 2))
    values = [exif.get(tag) for tag in (base.XResolution, base.YResolution)]
    if unit is None or None in values:
        return None
    return tuple(float(value) * unit for value in values)


def exif_with_dpi(exif: bytes | None, dpi: tuple[float, float]) -> bytes:
    """Put the resolution into EXIF, for formats that have no other place for it."""
    found = Image.Exif()
    found.load(exif or b"")
    base = ExifTags.Base
    found[base.XResolution], found[base.YResolution] = dpi
    found[base.ResolutionUnit] = 2
    return found.tobytes()
