"""Texts, captions and comments stay, and much of them does not cost the picture."""

from __future__ import annotations

import itertools
import json
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image, IptcImagePlugin, PngImagePlugin

from tadsr.images import (
    ArrayImage,
    count_frames,
    read_frames,
    read_image,
    strip_metadata,
    write_frames,
    write_image,
)

from .samples import SRGB_ICC, enlarged, png_chunk


def _with_texts(path, **texts):
    info = PngImagePlugin.PngInfo()
    for keyword, text in texts.items():
        if text.isascii():
            info.add_text(keyword.replace("_", " "), text, zip=len(text) > 100)
        else:
            info.add_itxt(keyword, text, lang="de", tkey="Titel")
    Image.new("RGB", (6, 5), "red").save(path, pnginfo=info)


@pytest.mark.parametrize("as_frames", [False, True])
def test_texts_of_a_png_stay(as_frames, tmp_path):
    workflow = json.dumps({"nodes": [7] * 100})
    texts = {"parameters": "a cat\nSteps: 20", "workflow": workflow, "Title": "Größe"}
    stale = {"Thumb::Image::Width": "6", "Raw_profile_type_exif": "exif 8 4142"}
    _with_texts(tmp_path / "in.png", **texts, **stale)
    if as_frames:
        animation = read_frames(tmp_path / "in.png")
        write_frames(animation, tmp_path / "out.png", durations_ms=animation.durations_ms)
    else:
        write_image(enlarged(read_image(tmp_path / "in.png")), tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as opened:
        assert opened.text == texts
        assert opened.text["Title"].lang == "de"
    write_image(strip_metadata(read_image(tmp_path / "in.png")), tmp_path / "bare.png")
    with Image.open(tmp_path / "bare.png") as opened:
        assert opened.text == {}


IPTC = b"\x1c\x02\x78\0\x07Caption" + b"\x1c\x02\x74\0\x03(c)"


@pytest.mark.parametrize("start", [".jpg", ".tif"])
@pytest.mark.parametrize("way", [".png", ".jpg", ".tif"])
def test_iptc_stays(start, way, tmp_path):
    image = Image.new("RGB", (6, 5), "red")
    image.info["iptc"] = IPTC
    write_image(image, tmp_path / f"in{start}")
    write_image(enlarged(read_image(tmp_path / f"in{start}")), tmp_path / f"way{way}")
    write_image(enlarged(read_image(tmp_path / f"way{way}")), tmp_path / "out.jpg")
    with Image.open(tmp_path / "out.jpg") as opened:
        found = IptcImagePlugin.getiptcinfo(opened)
    assert found == {(2, 120): b"Caption", (2, 116): b"(c)"}


@pytest.mark.parametrize("start", [".jpg", ".gif"])
@pytest.mark.parametrize("suffix", [".jpg", ".gif", ".png"])
def test_comments_stay(start, suffix, tmp_path):
    image = Image.new("RGB", (6, 5), "red")
    image.convert("P").convert("RGB").save(tmp_path / f"in{start}", comment=b"taken at noon")
    write_image(enlarged(read_image(tmp_path / f"in{start}")), tmp_path / f"out{suffix}")
    with Image.open(tmp_path / f"out{suffix}") as opened:
        found = opened.text["Comment"].encode() if suffix == ".png" else opened.info["comment"]
    assert found == b"taken at noon"


def _large_chunk(path, kind, place):
    """Write a PNG with a chunk that inflates to 1.2 MB, before or after its pixels."""
    pixels = np.full((5, 6, 3), (65535, 0, 0), np.uint16)
    write_image(ArrayImage(pixels), path)
    packed = zlib.compress(bytes(1_200_000))
    data = {
        b"zTXt": b"key\0\0" + packed,
        b"iTXt": b"key\0\1\0\0\0" + packed,
        b"iCCP": b"name\0\0" + zlib.compress(SRGB_ICC + bytes(1_200_000)),
    }[kind]
    whole = path.read_bytes()
    cut = 33 if place == "before" else len(whole) - 12
    path.write_bytes(whole[:cut] + png_chunk(kind, data) + whole[cut:])


@pytest.mark.parametrize(
    ("kind", "place"),
    [*itertools.product((b"zTXt", b"iTXt"), ("before", "after")), (b"iCCP", "before")],
)
def test_much_text_does_not_cost_the_picture(kind, place, tmp_path):
    _large_chunk(tmp_path / "a.png", kind, place)
    image = read_image(tmp_path / "a.png")
    assert image.pixels.dtype == np.uint16
    assert image.pixels[2, 2].tolist() == [65535, 0, 0]
    assert count_frames(tmp_path / "a.png") == 1
    if kind == b"iCCP":
        assert image.info["icc_profile"].startswith(SRGB_ICC)


def test_many_texts_cost_no_time(tmp_path):
    _large_chunk(tmp_path / "a.png", b"zTXt", "before")
    data = (tmp_path / "a.png").read_bytes()
    start = data.index(b"zTXt") - 4
    stop = start + 12 + struct.unpack_from(">I", data, start)[0]
    (tmp_path / "a.png").write_bytes(data[:start] + data[start:stop] * 3000 + data[stop:])
    begin = time.process_time()
    assert read_image(tmp_path / "a.png").size == (6, 5)
    assert time.process_time() - begin < 1  # 3.6 GB to inflate


def test_many_texts_do_not_cost_the_picture(tmp_path):
    info = PngImagePlugin.PngInfo()
    for number in range(8):
        info.add_text(f"k{number}", "x" * 9_000_000)
    Image.new("RGB", (6, 5), "red").save(tmp_path / "a.png", pnginfo=info)
    image = read_image(tmp_path / "a.png")
    assert image.getpixel((2, 2)) == (255, 0, 0)
    assert len(image.info["text"]) == 7  # what Pillow takes
