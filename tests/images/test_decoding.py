import struct

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

from tadsr.errors import ImageReadError
from tadsr.images import decode_image, encode_image

from .samples import SRGB_ICC, round_trip

GRAY_ICC = SRGB_ICC[:16] + b"GRAY" + SRGB_ICC[20:]


def _bands(*shape, high=256, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, high, shape).astype(dtype)


def _image(mode, width=7, height=5):
    """A PIL image of a mode with different pixels."""
    if mode in ("I;16", "I;16L", "I;16B", "I;16N"):
        dtype = ">u2" if mode == "I;16B" else "<u2"
        return Image.frombytes(
            mode, (width, height), _bands(height, width, high=65536, dtype=dtype).tobytes()
        )
    if mode == "I":
        return Image.fromarray(_bands(height, width, high=65536, dtype=np.int32))
    if mode == "F":
        return Image.fromarray(_bands(height, width, dtype=np.float32) + np.float32(-0.5)).point(
            lambda value: value * 0.5 + 1
        )
    rgba = Image.fromarray(_bands(height, width, 4).clip(1))  # under alpha 0 nothing is kept
    if mode in ("La", "PA"):
        return rgba.convert("LA").convert(mode)
    if mode == "RGBX":
        return Image.fromarray(np.asarray(rgba)).convert("RGB").convert("RGBX")
    if mode == "RGBA":
        return rgba
    return rgba.convert("RGBA" if mode == "RGBa" else "RGB").convert(mode)


def _cmyk_icc():
    """A minimal CMYK profile, a lut8 to Lab with 2 points an axis: cyan ink looks red."""
    white, red, black = (255, 128, 128), (130, 200, 190), (0, 128, 128)
    corners = [white, *[black] * 7, red, *[black] * 7]  # cyan varies slowest
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0])
    lut += struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    lut += bytes(range(256)) * 4 + bytes(sum(corners, ()))
    lut += bytes(range(256)) * 3
    lut += bytes(-len(lut) % 4)
    header = struct.pack(">I4xI4s4s4s", 144 + len(lut), 0x02100000, b"prtr", b"CMYK", b"Lab ")
    header += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    header += bytes(128 - len(header))
    return header + struct.pack(">I4sII", 1, b"A2B0", 144, len(lut)) + lut


@pytest.mark.parametrize(
    ("mode", "back"),
    [
        *((mode, mode) for mode in ("L", "LA", "RGB", "RGBA", "I;16", "I", "F")),
        *((mode, "I;16") for mode in ("I;16L", "I;16B", "I;16N")),
        *(("1", "L"), ("La", "LA"), ("PA", "RGBA"), ("RGBa", "RGBA")),
        *((mode, "RGB") for mode in ("P", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")),
    ],
)
def test_pil_round_trip_is_exact_in_the_mode_that_fits(mode, back):
    image = _image(mode)
    result = round_trip(image)
    assert result.mode == back
    same = image if back in (mode, "I;16") else image.convert(back)
    tolerance = 1e-6 if mode == "F" else 0
    np.testing.assert_allclose(np.asarray(result), np.asarray(same), rtol=tolerance)


def test_decoded_values_and_shapes():
    decoded = decode_image(Image.new("RGBA", (3, 2), (255, 0, 51, 102)))
    assert decoded.rgb.shape == (3, 2, 3)
    assert decoded.alpha.shape == (1, 2, 3)
    assert decoded.rgb.dtype == decoded.alpha.dtype == torch.float32
    torch.testing.assert_close(decoded.rgb[:, 0, 0], torch.tensor([1.0, 0.0, 0.2]))
    torch.testing.assert_close(decoded.alpha, torch.full((1, 2, 3), 0.4))
    assert decode_image(Image.new("RGB", (1, 1))).alpha is None


@pytest.mark.parametrize("mode", ["1", "L", "I;16", "I", "F"])
def test_gray_is_replicated_and_white_is_one(mode):
    white = {"1": 255, "L": 255, "F": 255.0}.get(mode, 65535)
    decoded = decode_image(Image.new(mode, (2, 2), white))
    torch.testing.assert_close(decoded.rgb, torch.ones(3, 2, 2))
    assert decoded.kind.is_gray


def test_gray_result_is_bt601_luma():
    like = decode_image(Image.new("L", (1, 1)))
    rgb = torch.tensor([1.0, 0.5, 0.25]).view(3, 1, 1)
    assert encode_image(rgb, None, like).getpixel((0, 0)) == round(
        255 * (0.299 + 0.587 * 0.5 + 0.114 * 0.25)
    )
    pt = encode_image(rgb, None, like, "pt")
    assert pt.shape == (3, 1, 1)
    assert pt.unique().numel() == 1


def test_integers_round_half_up_and_clamp():
    like = decode_image(Image.new("RGB", (1, 1), "red"))
    rgb = torch.tensor([2.5 / 255, -0.3, 1.7]).view(3, 1, 1)
    assert encode_image(rgb, None, like).getpixel((0, 0)) == (3, 0, 255)


def test_palette_with_transparency_file(tmp_path):
    image = _image("P")
    image.save(tmp_path / "p.png", transparency=bytes(range(256)))
    with Image.open(tmp_path / "p.png") as opened:
        assert opened.mode == "P"
        result = round_trip(opened)
        assert result.mode == "RGBA"
        np.testing.assert_array_equal(np.asarray(result), np.asarray(opened.convert("RGBA")))


@pytest.mark.parametrize(
    ("mode", "key", "back"),
    [
        ("1", 0, "LA"),
        ("L", 7, "LA"),
        ("RGB", (1, 2, 3), "RGBA"),
        ("P", 1, "RGBA"),
        ("I;16", 700, "LA"),
    ],
)
def test_transparent_color_of_a_png_becomes_alpha(mode, key, back, tmp_path):
    image = Image.new(mode, (4, 3), {"1": 1, "RGB": (9, 9, 9)}.get(mode, 0))
    if mode == "P":
        image.putpalette([0, 0, 0, 9, 9, 9])
    image.putpixel((2, 1), key)
    image.save(tmp_path / "key.png", transparency=key)
    with Image.open(tmp_path / "key.png") as opened:
        decoded = decode_image(opened)
        expected = torch.ones(1, 3, 4)
        expected[0, 1, 2] = 0
        assert torch.equal(decoded.alpha, expected)
        assert encode_image(decoded.rgb, decoded.alpha, decoded).mode == back


@pytest.mark.parametrize("key", [b"\x00\x01", (1, 2), 3.5, None])
def test_odd_transparency_entries_are_ignored(key):
    for mode in ("L", "RGB", "P"):
        image = _image(mode)
        image.info["transparency"] = (1, 2) if mode == "P" else key
        assert decode_image(image).alpha is None


def test_alpha_given_decides_about_alpha():
    opaque, clear = decode_image(_image("RGB")), decode_image(_image("RGBA"))
    assert encode_image(opaque.rgb, clear.alpha, opaque).mode == "RGBA"
    assert encode_image(clear.rgb, None, clear).mode == "RGB"
    gray = decode_image(_bands(5, 7))
    assert encode_image(gray.rgb, clear.alpha, gray).shape == (5, 7, 4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.Make] = "Camera"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExifImageWidth] = 7
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ISOSpeedRatings] = 100
    _image("RGB").save(tmp_path / "turned.jpg", exif=exif, quality=95)
    with Image.open(tmp_path / "turned.jpg") as opened:
        expected = ImageOps.exif_transpose(opened)
        result = round_trip(opened)
    assert result.size == ((7, 5) if orientation < 5 else (5, 7))
    np.testing.assert_array_equal(np.asarray(result), np.asarray(expected))
    kept = result.getexif()
    assert kept[ExifTags.Base.Make] == "Camera"
    assert kept[ExifTags.Base.Orientation] == 1
    assert dict(kept.get_ifd(ExifTags.IFD.Exif)) == {ExifTags.Base.ISOSpeedRatings: 100}


def test_profile_and_dpi_are_kept():
    image = _image("RGB")
    image.info |= {"icc_profile": SRGB_ICC, "dpi": (300, 300), "comment": "not kept"}
    assert round_trip(image).info == {"icc_profile": SRGB_ICC, "dpi": (300, 300)}


@pytest.mark.parametrize(
    ("mode", "profile", "is_kept"),
    [
        ("L", GRAY_ICC, True),
        ("I;16", GRAY_ICC, True),
        ("L", SRGB_ICC, False),
        ("RGB", GRAY_ICC, False),
        ("P", SRGB_ICC, True),
        ("RGB", b"short", False),
    ],
)
def test_profile_is_kept_where_it_fits(mode, profile, is_kept):
    image = _image(mode)
    image.info["icc_profile"] = profile
    assert ("icc_profile" in round_trip(image).info) == is_kept


def test_cmyk_jpeg_goes_through_its_profile(tmp_path):
    profile = _cmyk_icc()
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "c.jpg", icc_profile=profile)
    with Image.open(tmp_path / "c.jpg") as opened:
        assert opened.mode == "CMYK"
        assert opened.info["icc_profile"] == profile
        result = round_trip(opened)
    assert result.mode == "RGB"
    assert "icc_profile" not in result.info
    red, green, blue = result.getpixel((4, 4))  # (0, 255, 255) by Pillow's formula
    assert red > 180
    assert green < 80
    assert blue < 80


UNUSABLE_PROFILES = (None, 7, b"x" * 16 + b"CMYK" + b"x" * 200, SRGB_ICC)


@pytest.mark.parametrize(
    ("mode", "key", "value"),
    [
        ("RGB", "exif", b"Exif\x00\x00 no TIFF header"),
        *(("CMYK", "icc_profile", profile) for profile in UNUSABLE_PROFILES),
    ],
)
def test_unusable_exif_and_profiles_do_not_lose_the_image(mode, key, value):
    image = _image(mode)
    image.info[key] = value
    result = round_trip(image)
    assert key not in result.info or value == SRGB_ICC
    np.testing.assert_array_equal(np.asarray(result), np.asarray(image.convert("RGB")))


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("L", (4, 4), value) for value in (10, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "a.gif") as opened:
        assert opened.n_frames == 2
        torch.testing.assert_close(decode_image(opened).rgb, torch.full((3, 4, 4), 10 / 255))


def test_the_given_image_is_not_changed():
    image = _image("P")
    image.info |= {"transparency": 3, "icc_profile": SRGB_ICC}
    before, info = image.copy(), dict(image.info)
    decode_image(image).rgb.zero_()
    assert image.info == info
    assert image.mode == "P"
    np.testing.assert_array_equal(np.asarray(image), np.asarray(before))
    array = np.ones((3, 3, 3), np.float32)
    tensor = torch.ones(3, 3, 3)
    for given_ in (array, tensor):
        decode_image(given_).rgb.zero_()
        assert given_.min() == 1


def test_truncated_file_surfaces_at_decoding(tmp_path):
    path = tmp_path / "half.png"
    Image.fromarray(_bands(64, 64, 3)).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    with Image.open(path) as opened, pytest.raises(ImageReadError, match=r"half\.png"):
        decode_image(opened)
