import re
import struct
import time

import numpy as np
import pytest
import tifffile
import torch
from PIL import ExifTags, Image, features

from tadsr.images import (
    ArrayImage,
    decode_image,
    read_image,
    strip_metadata,
    strips,
    upright_size,
    write_image,
    write_strips,
)
from tadsr.images.strips import PngWriter

from .samples import SRGB_ICC, enlarged

XMP = b"""<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description tiff:Orientation="6"
 tiff:ImageWidth="7" exif:PixelXDimension='7' dc:title="Caf\xc3\xa9">
<exif:PixelYDimension>5</exif:PixelYDimension><tiff:Orientation>6</tiff:Orientation>
<xmp:Thumbnails><rdf:li>/9j/4AAQ</rdf:li></xmp:Thumbnails><xmp:Rating>4</xmp:Rating>
</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>"""
LATITUDE = (52.0, 31.0, 12.5)
SUFFIXES = [".png", ".jpg", ".webp", ".tif"] + [".avif"] * features.check("avif")
BASE, IFD = ExifTags.Base, ExifTags.IFD


def _exif(orientation=6):
    exif = Image.Exif()
    exif[BASE.Orientation] = orientation
    exif[BASE.Make] = "Camera"
    exif[BASE.ImageWidth], exif[BASE.ImageLength] = 7, 5
    photo = exif.get_ifd(IFD.Exif)
    photo[BASE.ExifImageWidth], photo[BASE.ExifImageHeight] = 7, 5
    photo[BASE.ISOSpeedRatings] = 100
    photo[BASE.LensModel] = "50 mm f/1.8, a name that does not fit four bytes"
    exif.get_ifd(IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] = LATITUDE
    exif.get_ifd(IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] = "N"
    return exif


def _photo(width=7, height=5):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(pixels)
    image.info |= {"icc_profile": SRGB_ICC, "exif": _exif().tobytes(), "dpi": (300, 240)}
    image.info["xmp"] = XMP
    return image


def _check_kept(path, orientation=1):
    """Check with Pillow alone that a file has all metadata, and none that is stale."""
    with Image.open(path) as opened:
        opened.load()
        exif, info = opened.getexif(), opened.info
        photo, gps = exif.get_ifd(IFD.Exif), exif.get_ifd(IFD.GPSInfo)
        assert exif.get(BASE.Orientation, 1) == orientation
        assert exif.get_ifd(IFD.IFD1) == {}
    assert exif[BASE.Make] == "Camera"
    assert photo[BASE.ISOSpeedRatings] == 100
    assert photo[BASE.LensModel].startswith("50 mm f/1.8, a name")
    assert BASE.ExifImageWidth not in photo
    assert [float(value) for value in gps[ExifTags.GPS.GPSLatitude]] == list(LATITUDE)
    assert info["icc_profile"] == SRGB_ICC
    assert b'dc:title="Caf\xc3\xa9"' in info["xmp"]
    assert b"<xmp:Rating>4<" in info["xmp"]
    assert set(re.findall(rb'tiff:Orientation(?:="|>)([0-9])', info["xmp"])) <= {b"1"}
    for stale in (b"Dimension", b"ImageWidth", b"Thumbnails"):
        assert stale not in info["xmp"]
    dpi = decode_image(read_image(path)).kind.info["dpi"]
    assert dpi == pytest.approx((300, 240), abs=0.2)


def test_xmp_of_many_beginnings_takes_no_time():
    image = Image.new("L", (3, 2))
    image.info["xmp"] = b"<xmp:Thumbnails><tiff:ImageWidth>" * 20_000
    begin = time.process_time()
    decode_image(image)
    assert time.process_time() - begin < 1


@pytest.mark.parametrize("source", SUFFIXES)
@pytest.mark.parametrize("target", SUFFIXES)
def test_metadata_goes_from_every_format_to_every_other(source, target, tmp_path):
    # Upright already but for the tags, which AVIF would carry out by itself.
    image = _photo()
    image.info["exif"] = _exif(1).tobytes()
    write_image(image, tmp_path / f"in{source}")
    result = enlarged(read_image(tmp_path / f"in{source}"))
    write_image(result, tmp_path / f"out{target}")
    _check_kept(tmp_path / f"out{target}")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_turned_photo_is_upright_once(suffix, tmp_path):
    result = enlarged(_photo())
    assert result.size == (10, 14)
    write_image(result, tmp_path / f"a{suffix}")
    _check_kept(tmp_path / f"a{suffix}")
    assert decode_image(read_image(tmp_path / f"a{suffix}")).rgb.shape == (3, 14, 10)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("is_16bit", [False, True])
@pytest.mark.parametrize("byte_order", ["<", ">"])
def test_metadata_in_strips(byte_order, is_16bit, suffix, tmp_path):
    exif = _exif()
    exif.endian = byte_order
    image = _photo()
    image.info["exif"] = exif.tobytes()
    if is_16bit:
        upright = decode_image(image)
        pixels = (upright.rgb.permute(1, 2, 0).numpy() * 65535).astype(np.uint16)
        image = ArrayImage(pixels, upright.kind.info)
    like = decode_image(image)
    path = tmp_path / f"a{suffix}"
    parts = [(0, like.rgb[:, :3], None), (3, like.rgb[:, 3:], None)]
    write_strips(parts, path, like=like, size=(7, 5))
    _check_kept(path)
    torch.testing.assert_close(decode_image(read_image(path)).rgb, like.rgb, rtol=0, atol=1e-4)


@pytest.mark.parametrize("byte_order", ["<", ">"])
def test_exif_in_a_big_tiff(byte_order, monkeypatch, tmp_path):
    monkeypatch.setattr(strips, "_ROOM_FOR_TAGS", 2**32)  # every file is a large one then
    exif = _exif(1)
    exif.endian = byte_order
    info = decode_image(_photo()).kind.info | {"exif": exif.tobytes()}
    write_image(ArrayImage(np.zeros((5, 7, 3), np.uint16), info), tmp_path / "a.tif")
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert file.is_bigtiff
        tags = file.pages[0].tags
        assert tags["Make"].value == "Camera"
        assert tags["ExifTag"].value["ISOSpeedRatings"] == 100
        assert tags["ExifTag"].value["LensModel"].startswith("50 mm f/1.8, a name")
        assert tags["GPSTag"].value["GPSLatitude"] == (52, 1, 31, 1, 25, 2)
        assert file.pages[0].asarray().shape == (5, 7, 3)


def test_thumbnail_goes(tmp_path):
    exif = _exif(1).tobytes()
    # A second directory after the first: Compression 6, and where a JPEG would be.
    start = int.from_bytes(exif[10:14], "big")
    count = int.from_bytes(exif[6 + start : 8 + start], "big")
    link = 6 + start + 2 + 12 * count
    directory = b"\0\1" + b"\x01\x03\0\3\0\0\0\1\0\6\0\0" + bytes(4)
    exif = exif[:link] + (len(exif) - 6).to_bytes(4, "big") + exif[link + 4 :] + directory
    image = _photo()
    image.info["exif"] = exif
    image.save(tmp_path / "in.jpg", exif=exif)
    with Image.open(tmp_path / "in.jpg") as opened:
        assert opened.getexif().get_ifd(IFD.IFD1) == {259: 6}
    write_image(enlarged(read_image(tmp_path / "in.jpg")), tmp_path / "out.jpg")
    with Image.open(tmp_path / "out.jpg") as opened:
        assert opened.getexif().get_ifd(IFD.IFD1) == {}


def test_dpi_in_centimetres_and_xmp_of_a_text_chunk():
    image = Image.new("RGB", (3, 2))
    exif = Image.Exif()
    exif[BASE.XResolution], exif[BASE.YResolution] = 100, 50
    exif[BASE.ResolutionUnit] = 3
    image.info |= {"exif": exif.tobytes(), "XML:com.adobe.xmp": "<x:xmpmeta/>"}
    info = decode_image(image).kind.info
    assert info["dpi"] == pytest.approx((254, 127))
    assert info["xmp"] == b"<x:xmpmeta/>"


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".bmp"])
@pytest.mark.parametrize("is_kept", [True, False])
def test_dpi_that_no_device_has_does_not_cost_the_picture(is_kept, suffix, tmp_path):
    image = Image.new("RGB", (8, 8))
    odd = [(2e8, 300), ("72", "72"), (float("nan"), 72), (0, 0), 72, (72,)]
    for dpi in [(65535, 65535), (1e-9, 1e-9)] if is_kept else odd:
        image.info["dpi"] = dpi
        write_image(image, tmp_path / f"a{suffix}")
        assert read_image(tmp_path / f"a{suffix}").size == (8, 8), dpi
        assert decode_image(image).kind.info == ({"dpi": dpi} if is_kept else {}), dpi


@pytest.mark.parametrize("packet", [b"\xff\xfe<\0x\0", b"\0  \n", b"", 7])
def test_xmp_that_cannot_be_normalised_goes(packet):
    image = Image.new("RGB", (3, 2))
    image.info["xmp"] = packet
    assert decode_image(image).kind.info == {}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("is_16bit", [False, True])
@pytest.mark.parametrize("cut", [3, 9, 20, 60, 200, 260, 300])
def test_damaged_exif_does_not_cost_the_picture(cut, is_16bit, suffix, tmp_path):
    image = _photo()
    image.info["exif"] = image.info["exif"][:cut]
    if is_16bit:
        image = ArrayImage(np.zeros((5, 7, 3), np.uint16), image.info)
    write_image(image, tmp_path / f"a{suffix}")
    assert decode_image(read_image(tmp_path / f"a{suffix}")).rgb.shape[0] == 3


def test_exif_that_points_to_itself(tmp_path):
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2)
    for tag in (34665, 34853):
        exif += struct.pack("<HHII", tag, 4, 1, 8)
    image = _photo()
    image.info["exif"] = exif + bytes(4)
    write_image(image, tmp_path / "a.tif")
    assert read_image(tmp_path / "a.tif").size == (7, 5)


LONG_EXIF = Image.Exif()
LONG_EXIF[BASE.ImageDescription] = "long " * 14_000


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("exif", LONG_EXIF.tobytes()),
        ("xmp", b"<x:xmpmeta>" + b" " * 70_000),
        ("comment", b"x" * 70_000),
        ("icc_profile", SRGB_ICC + bytes(17_000_000)),
    ],
)
def test_oversized_metadata_does_not_cost_a_jpeg(key, value, tmp_path):
    image = Image.new("RGB", (8, 8))
    image.info[key] = value
    write_image(image, tmp_path / "a.jpg")
    assert key not in read_image(tmp_path / "a.jpg").info


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("is_16bit", [False, True])
def test_strip_leaves_the_profile_alone(is_16bit, suffix, tmp_path):
    image = _photo()
    expected = decode_image(image).rgb
    if is_16bit:
        info = decode_image(image).kind.info
        image = ArrayImage((expected.permute(1, 2, 0).numpy() * 65535).astype(np.uint16), info)
    bare = strip_metadata(image)
    torch.testing.assert_close(decode_image(bare).rgb, expected, rtol=0, atol=2e-5)
    assert decode_image(bare).kind.info == {"icc_profile": SRGB_ICC}
    assert len(image.info) == 4
    write_image(enlarged(bare), tmp_path / f"a{suffix}")
    with Image.open(tmp_path / f"a{suffix}") as opened:
        opened.load()
        assert opened.info["icc_profile"] == SRGB_ICC
        assert not {"exif", "xmp"} & set(opened.info)
        assert opened.info.get("dpi", (1, 1)) == (1, 1)  # what Pillow says for nothing
        assert BASE.Make not in opened.getexif()
    data = (tmp_path / f"a{suffix}").read_bytes()
    assert b"Camera" not in data
    assert b"xmpmeta" not in data


def test_strip_keeps_transparency(tmp_path):
    image = Image.new("P", (4, 3))
    image.putpalette([0, 0, 0, 9, 9, 9])
    image.putpixel((2, 1), 1)
    image.info |= {"transparency": 1, "comment": "secret"}
    bare = strip_metadata(image)
    assert bare.info == {"transparency": 1}
    torch.testing.assert_close(decode_image(bare).alpha, decode_image(image).alpha)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", "16.png"])
def test_a_photo_is_turned_whatever_else_of_its_exif_is_damaged(suffix, tmp_path):
    # Orientation 6, and a camera's make that is a number: read, it cannot be written again.
    orientation = struct.pack("<HHIHH", ExifTags.Base.Orientation, 3, 1, 6, 0)
    make = struct.pack("<HHII", ExifTags.Base.Make, 5, 1, 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + orientation + make + bytes(4)
    path = tmp_path / f"a{suffix}"
    if suffix == "16.png":
        with open(path, "wb") as file:
            shape = (5, 7, 3)
            writer = PngWriter(file, shape, np.dtype(np.uint16), {"exif": exif})
            writer.write_image([np.zeros(shape, np.uint16)])
    else:
        Image.new("RGB", (7, 5)).save(path, exif=exif)
    image = read_image(path)
    assert decode_image(image).rgb.shape == (3, 7, 5)
    assert "exif" not in decode_image(image).kind.info
    if isinstance(image, Image.Image):
        assert upright_size(image) == strip_metadata(image).size == (5, 7)
