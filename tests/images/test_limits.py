"""Files that promise more than they may, or cost more than they hold."""

import struct
import time
from itertools import starmap

import numpy as np
import pytest
from PIL import Image

from tadsr.errors import ImageReadError, ImageReadWarning, ImageTooLargeError
from tadsr.images import (
    MAX_PIXELS,
    ArrayImage,
    count_frames,
    find_losses,
    read_frames,
    read_image,
    write_frames,
    write_image,
)

from .samples import noise, png_chunk


def _huge_png(width, height, color=0, depth=1):
    """A PNG of few bytes that claims width × height pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", b""), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(starmap(png_chunk, chunks))


def test_decompression_bomb_in_pillows_eyes(tmp_path):
    (tmp_path / "zero.png").write_bytes(_huge_png(0, 5))
    with pytest.raises(ImageReadError, match=r"zero\.png"):
        read_image(tmp_path / "zero.png")
    (tmp_path / "bomb.png").write_bytes(_huge_png(30_000, 20_000))
    for max_pixels in (10, MAX_PIXELS, None):
        with pytest.raises(ImageReadError, match=r"600000000.*178956970|trust"):
            read_image(tmp_path / "bomb.png", max_pixels=max_pixels)


@pytest.mark.filterwarnings("default::PIL.Image.DecompressionBombWarning")
def test_small_files_hold_fewer_pixels(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(_huge_png(10_000, 10_000, color=2, depth=8))
    with pytest.raises(ImageTooLargeError, match=r"file of only 57 bytes .* 59652323 pixels"):
        read_image(path)
    for trusted in ({"max_pixels": None}, {"max_pixels": 300_000_000}):
        with pytest.raises(ImageReadError, match="intact copy"):  # it holds nothing
            read_image(path, **trusted)


def test_what_costs_more_than_its_pixels_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr("tadsr.images.containers._MAX_CHUNKS", 1000)
    monkeypatch.setattr("tadsr.images.reading._MAX_TILES", 500)
    image = Image.new("RGB", (16, 16))
    image.save(tmp_path / "a.jp2", no_jp2=True)
    data = (tmp_path / "a.jp2").read_bytes()
    start = data.index(b"\xff\x51") + 6
    size = struct.pack(">II", 6000, 6000)
    (tmp_path / "a.jp2").write_bytes(data[:start] + size + data[start + 8 :])
    image.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[:33] + struct.pack(">I4sI", 0, b"teXt", 0) * 1000)
    Image.new("L", (1, 600)).save(tmp_path / "a.tif", tiffinfo={278: 1}, strip_size=1)
    for name, message in [
        ("a.jp2", r"at most 23860929 pixels"),
        ("a.png", "1000 chunks"),
        ("a.tif", "500 strips"),
    ]:
        with pytest.raises(ImageReadError, match=message):
            read_image(tmp_path / name)


def test_jpegs_of_many_scans_are_refused(tmp_path):
    path = tmp_path / "bomb.jpg"
    Image.new("L", (2000, 2000)).save(path, progressive=True)
    data = path.read_bytes()
    start = data.rindex(b"\xff\xda")
    path.write_bytes(data[:start] + data[start:-2] * 900 + data[-2:])
    begin = time.process_time()
    with pytest.raises(ImageTooLargeError, match=r"at most 894 scans, got 90\d"):
        read_image(path)
    assert time.process_time() - begin < 0.5
    path.write_bytes(data)
    assert read_image(path).size == (2000, 2000)


def test_pages_are_not_counted(tmp_path):
    Image.new("L", (3, 2)).save(tmp_path / "a.tif")
    data = (tmp_path / "a.tif").read_bytes()
    first, num_pages = len(data) + len(data) % 2, 10_000
    data = data.ljust(first, b"\0")
    (start,) = struct.unpack_from("<I", data, 4)
    table = data[start : start + 2 + 12 * struct.unpack_from("<H", data, start)[0]]
    stops = (first + (page + 1) * (len(table) + 4) for page in range(num_pages))
    pages = b"".join(table + struct.pack("<I", stop) for stop in stops)
    (tmp_path / "a.tif").write_bytes(data[:4] + struct.pack("<I", first) + data[8:] + pages)
    begin = time.process_time()
    with pytest.warns(ImageReadWarning, match="several pages"):
        read_image(tmp_path / "a.tif")
    assert time.process_time() - begin < 0.5


@pytest.mark.filterwarnings("default::PIL.Image.DecompressionBombWarning")
def test_max_pixels(tmp_path):
    limit = Image.MAX_IMAGE_PIXELS
    (tmp_path / "large.png").write_bytes(_huge_png(10_000, 10_000))
    with pytest.raises(ImageReadError, match="at most 99999999 pixels, got 10000×10000"):
        read_image(tmp_path / "large.png", max_pixels=99_999_999)
    noise(width=5, height=4).save(tmp_path / "small.png")
    assert read_image(tmp_path / "small.png", max_pixels=20).size == (5, 4)
    with pytest.raises(ImageReadError, match="max_pixels"):
        read_image(tmp_path / "small.png", max_pixels=19)
    with pytest.raises(ValueError, match="max_pixels"):
        read_image(tmp_path / "small.png", max_pixels=0)
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".gif", "16.png"])
@pytest.mark.parametrize("limit", [200, 100])  # Pillow warns, and refuses
def test_trusted_files_may_be_larger_than_pillow_allows(suffix, limit, tmp_path, monkeypatch):
    path = tmp_path / f"large{suffix}"
    image = noise(width=24, height=16)
    if suffix == "16.png":
        image = ArrayImage(np.asarray(image).astype(np.uint16) * 257)
    write_image(image, path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ImageReadError, match=r"trust the file.*--max-pixels"):
        read_image(path)
    assert read_image(path, max_pixels=MAX_PIXELS + 1).size == (24, 16)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ImageReadError):
        read_image(path, max_pixels=MAX_PIXELS + 1)
    assert limit == Image.MAX_IMAGE_PIXELS


def test_trusted_files_of_several_images(tmp_path, monkeypatch):
    frames = [noise(seed=seed) for seed in range(3)]
    for suffix in (".gif", ".tif"):
        frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    trust = {"max_pixels": MAX_PIXELS + 1}
    with pytest.raises(ImageReadError, match="--max-pixels"):
        read_frames(tmp_path / "a.gif")
    clip = read_frames(tmp_path / "a.gif", **trust)
    for frame in clip:
        assert frame.size == (24, 16)
        assert Image.MAX_IMAGE_PIXELS == 100  # while others work on the frame
    assert count_frames(tmp_path / "a.gif", **trust) == 3
    assert "several pages" in find_losses(tmp_path / "a.tif", **trust)[0]


def test_a_real_file_of_200_megapixels(tmp_path):
    path = tmp_path / "large.png"
    Image.new("1", (20_000, 10_000), 1).save(path)
    with pytest.raises(ImageReadError, match=r"178956970 pixels.*--max-pixels"):
        read_image(path)
    assert read_image(path, max_pixels=200_000_000).getpixel((19_999, 9_999)) == 255


def test_wide_pixels_count_as_several(tmp_path):
    write_image(ArrayImage(np.zeros((10, 20, 3), np.uint16)), tmp_path / "a.png")
    with pytest.raises(ImageTooLargeError, match="at most 199 pixels, which take 14 bytes each"):
        read_image(tmp_path / "a.png", max_pixels=349)
    assert read_image(tmp_path / "a.png", max_pixels=350).width == 20


def test_many_frames_of_no_size_and_one_beyond_the_others_are_refused(tmp_path):
    path = tmp_path / "a.gif"
    Image.new("L", (1, 1)).save(path)
    data = path.read_bytes()
    start = data.rindex(b",")
    larger = data[start : start + 5] + struct.pack("<HH", 8000, 8000) + data[start + 9 :]
    for content, told in (
        (data[:start] + data[start:-1] * 22_000 + data[-1:], "22000 × 1×1"),
        (data[:-1] + larger, "8000×8000"),
    ):
        path.write_bytes(content)
        with pytest.raises(ImageTooLargeError, match=told):
            read_frames(path)


def test_frames_are_limited_together(tmp_path):
    frames = [Image.new("RGB", (20, 10), (i, 0, 0)) for i in range(10)]
    write_frames(frames, tmp_path / "a.gif", durations_ms=[20] * 10)
    with pytest.raises(ImageTooLargeError, match="10 × 20×10"):
        read_frames(tmp_path / "a.gif", max_pixels=1999)
    assert len(read_frames(tmp_path / "a.gif", max_pixels=2000)) == 10
    write_frames(frames[:2], tmp_path / "b.gif", durations_ms=[20] * 2)
    with pytest.raises(ImageTooLargeError, match="at most 199 pixels, which take 16 bytes each"):
        read_frames(tmp_path / "b.gif", max_pixels=399)
    assert len(read_frames(tmp_path / "b.gif", max_pixels=400)) == 2
