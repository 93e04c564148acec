"""Colour spaces that a file tells in any way are still told, or turned into sRGB."""

from __future__ import annotations

import io
import struct
import warnings

import numpy as np
import pytest
from PIL import Image, ImageCms

from tadsr.errors import ImageReadWarning
from tadsr.images import decode_image, encode_image, find_losses, read_frames, read_image
from tadsr.images import write_image as write
from tadsr.images.color_space import profile_of_code_points, to_srgb
from tadsr.measure.pictures import read_rgb8

from .samples import SRGB_ICC, png_chunk

COLOR = (120, 150, 100)
P3_SEEN = (112, 151, 94)
"""What that is in sRGB where it was Display P3, by the standards' formulas."""


def write_told(path, primaries, transfer, *, depth=np.uint8, frames=1):
    """Write a flat picture that tells its colours by code points alone."""
    image = Image.new("RGB", (32, 32), COLOR)
    if path.suffix == ".avif":
        others = [Image.new("RGB", (32, 32), (9, 200, 99))] * (frames - 1)
        image.save(path, quality=100, save_all=frames > 1, append_images=others)
        data = bytearray(path.read_bytes())
        place = data.find(b"colrnclx")
        data[place + 8 : place + 12] = struct.pack(">HH", primaries, transfer)
        path.write_bytes(data)
        return
    if depth == np.uint16:
        from tadsr.images import ArrayImage

        write(ArrayImage(np.asarray(image).astype(np.uint16) * 257), path)
    else:
        image.save(path)
    data = path.read_bytes()
    told = png_chunk(b"cICP", bytes([primaries, transfer, 0, 1]))
    path.write_bytes(data[:33] + told + data[33:])


@pytest.mark.parametrize("out", [".png", ".jpg", ".webp", ".tif", ".avif"])
@pytest.mark.parametrize("name", ["a.avif", "a.png", "wide.png"])
def test_code_points_become_a_profile(name, out, tmp_path):
    depth = np.uint16 if name == "wide.png" else np.uint8
    write_told(tmp_path / name, 12, 13, depth=depth)
    decoded = decode_image(read_image(tmp_path / name))
    write(encode_image(decoded.rgb, None, decoded), tmp_path / f"out{out}", quality=100)
    seen = read_rgb8(tmp_path / f"out{out}")[16, 16].astype(int)
    assert np.abs(seen - P3_SEEN).max() <= 4


def test_an_animations_code_points_too(tmp_path):
    write_told(tmp_path / "a.avif", 9, 1, frames=2)
    profile = read_frames(tmp_path / "a.avif").info["icc_profile"]
    assert profile == profile_of_code_points(9, 1, b"RGB ")


@pytest.mark.parametrize(("primaries", "transfer"), [(1, 13), (2, 2), (1, 1), (200, 13)])
def test_srgb_and_what_nobody_knows_need_no_profile(primaries, transfer, tmp_path):
    write_told(tmp_path / "a.avif", primaries, transfer)
    assert "icc_profile" not in read_image(tmp_path / "a.avif").info


@pytest.mark.parametrize(("transfer", "curve"), [(16, "PQ"), (18, "HLG")])
@pytest.mark.parametrize("name", ["a.avif", "a.png", "wide.png"])
def test_hdr_is_warned_of_and_kept_in_png(name, transfer, curve, tmp_path):
    depth = np.uint16 if name == "wide.png" else np.uint8
    write_told(tmp_path / name, 9, transfer, depth=depth)
    assert f"is HDR ({curve})" in find_losses(tmp_path / name)[0]
    with pytest.warns(ImageReadWarning, match=curve):
        image = read_image(tmp_path / name)
    write(image, tmp_path / "out.png")
    assert png_chunk(b"cICP", bytes([9, transfer, 0, 1])) in (tmp_path / "out.png").read_bytes()


def test_made_profiles_are_those_of_the_standard():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for space in (b"RGB ", b"GRAY"):
            made = profile_of_code_points(12, 13, space)
            ImageCms.ImageCmsProfile(io.BytesIO(made))
    pixels = np.full((1, 1, 3), COLOR, np.uint8)
    assert (
        np.abs(to_srgb(pixels, profile_of_code_points(12, 13, b"RGB "))[0, 0] - [*P3_SEEN]).max()
        <= 2
    )
    assert to_srgb(pixels, SRGB_ICC) is pixels
    assert to_srgb(pixels, b"damaged") is pixels
