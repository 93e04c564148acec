"""JPEG XL and cameras' raw files, whose libraries are extras."""

import builtins
import io

import numpy as np
import pytest
import tifffile
from PIL import ExifTags, Image, ImageCms

from tadsr.errors import ImageReadError, ImageTooLargeError, ImageWriteError
from tadsr.images import ArrayImage, read_facts, read_image, write_image

PIXELS = np.uint8(np.random.default_rng(0).integers(0, 256, (12, 20, 3)))


def write_dng(path, height=32, width=48):
    """Write a grey card under a warm light: in the camera's eyes red is half of green."""
    seen = np.array([[0, 1], [1, 2]])  # which colour each sensor of four sees
    light = np.array([0.25, 0.5, 0.5])
    mosaic = np.uint16(65535 * light[np.tile(seen, (height // 2, width // 2))])
    from_xyz = (3.2406, -1.5372, -0.4986, -0.9689, 1.8758, 0.0415, 0.0557, -0.204, 1.057)
    rational = [n for value in from_xyz for n in (round(10000 * value), 10000)]
    tags = [
        (50706, 1, 4, bytes([1, 4, 0, 0]), True),  # version
        (50708, 2, 0, "A camera", True),
        (33421, 3, 2, (2, 2), True),
        (33422, 1, 4, bytes([0, 1, 1, 2]), True),
        (50721, 10, 9, rational, True),
        (50728, 5, 3, (1, 2, 1, 1, 1, 1), True),  # neutral, as shot
        (50717, 4, 1, 65535, True),
        (50778, 3, 1, 21, True),
        (271, 2, 0, "Maker", True),
        (274, 3, 1, 6, True),  # lies on its side
    ]
    tifffile.imwrite(path, mosaic, photometric=32803, extratags=tags, metadata=None)


def test_a_raw_file_is_developed_with_the_cameras_white_balance(tmp_path):
    write_dng(tmp_path / "photo.dng")
    image = read_image(tmp_path / "photo.dng")
    assert isinstance(image, ArrayImage)
    assert image.size == (32, 48) == read_facts(tmp_path / "photo.dng").size
    grey = image.pixels[8:-8, 8:-8].reshape(-1, 3)
    assert image.pixels.dtype == np.uint16
    assert np.ptp(grey) < 600  # no tint
    assert abs(grey.mean() / 65535 - (1.055 * 0.5 ** (1 / 2.4) - 0.055)) < 0.01
    exif = Image.Exif()
    exif.load(image.info["exif"])
    assert exif[ExifTags.Base.Make] == "Maker"
    assert exif[ExifTags.Base.Orientation] == 1
    with pytest.raises(ImageTooLargeError):
        read_image(tmp_path / "photo.dng", max_pixels=1000)
    (tmp_path / "cut.nef").write_bytes((tmp_path / "photo.dng").read_bytes()[:300])
    with pytest.raises(ImageReadError, match=r"cut\.nef"):
        read_image(tmp_path / "cut.nef")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA"])
def test_jpeg_xl_without_loss_gives_the_pixels_back(tmp_path, mode):
    image = Image.fromarray(PIXELS).convert(mode)
    if "A" in mode:
        image.putalpha(Image.fromarray(PIXELS[..., 1]))
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Maker"
    exif[ExifTags.Base.Orientation] = 6
    image.info["exif"] = exif.tobytes()
    write_image(image, tmp_path / "a.jxl", is_lossless=True)
    found = read_image(tmp_path / "a.jxl")
    assert found.mode == mode
    # Turned upright, since viewers do not look at EXIF's orientation.
    upright = image.transpose(Image.Transpose.ROTATE_270)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(upright))
    assert found.getexif()[ExifTags.Base.Make] == "Maker"
    assert read_facts(tmp_path / "a.jxl").size == (12, 20)


def test_jpeg_xl_takes_the_picture_not_the_jpeg_that_it_came_from(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as image:
        image.paste((255, 0, 0), (0, 0, 20, 12))
        write_image(image, tmp_path / "a.jxl", is_lossless=True)
    assert read_image(tmp_path / "a.jxl").getpixel((5, 5)) == (255, 0, 0)


def test_colours_of_a_profile_are_converted_for_jpeg_xl(tmp_path):
    from tadsr.images.color_space import profile_of_code_points

    image = Image.new("RGB", (8, 8), (0, 200, 0))
    image.info["icc_profile"] = profile = profile_of_code_points(12, 13, b"RGB ")  # Display P3
    write_image(image, tmp_path / "a.jxl", is_lossless=True)
    expected = ImageCms.profileToProfile(
        image, ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
    )
    assert read_image(tmp_path / "a.jxl").getpixel((4, 4)) == expected.getpixel((4, 4))


@pytest.mark.parametrize("in_container", [False, True])
def test_a_jpeg_xl_that_pretends_to_be_large_is_not_decoded(tmp_path, in_container):
    bits, place = 0, 0
    # Height of 30 bits, width of 30 bits, no ratio.
    for value, count in [(0, 1), (3, 2), (59999, 30), (0, 3), (3, 2), (69999, 30)]:
        bits |= value << place
        place += count
    stream = b"\xff\x0a" + bits.to_bytes(12, "little")
    if in_container:
        boxes = [(b"ftyp", b"jxl \0\0\0\0jxl "), (b"Exif", bytes(9)), (b"jxlp", bytes(4) + stream)]
        stream = b"\0\0\0\x0cJXL \r\n\x87\n" + b"".join(
            (8 + len(data)).to_bytes(4, "big") + kind + data for kind, data in boxes
        )
    (tmp_path / "bomb.jxl").write_bytes(stream)
    with pytest.raises(ImageTooLargeError, match="70000×60000"):
        read_image(tmp_path / "bomb.jxl")


@pytest.mark.parametrize("library", ["rawpy", "pillow_jxl"])
def test_a_missing_library_is_named(tmp_path, monkeypatch, library):
    write_image(Image.fromarray(PIXELS), tmp_path / "a.jxl")
    write_dng(tmp_path / "a.dng")
    original = builtins.__import__

    def refuse(name, *arguments, **options):
        if name.partition(".")[0] == library:
            raise ImportError(name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    name, extra = ("a.dng", "raw") if library == "rawpy" else ("a.jxl", "jxl")
    with pytest.raises(ImageReadError, match=rf"tadsr\[{extra}\]"):
        read_image(tmp_path / name)


def test_jpeg_xl_holds_no_animation(tmp_path):
    from tadsr.images import check_writable

    with pytest.raises(ImageWriteError, match="animation"):
        check_writable(tmp_path / "a.jxl", num_frames=2)
