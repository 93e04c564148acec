import os
import signal
import struct
import subprocess
import sys
import time
from contextlib import suppress
from itertools import starmap

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, features

from tadsr.errors import ImageReadError, ImageReadWarning, ImageTooLargeError, ImageWriteError
from tadsr.images import (
    MAX_PIXELS,
    ArrayImage,
    check_writable,
    count_frames,
    decode_image,
    encode_image,
    files,
    find_losses,
    is_see_through,
    read_frames,
    read_image,
    write_image,
)

from .samples import SRGB_ICC, png_chunk

SUFFIXES = [".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp"]
if features.check("avif"):
    SUFFIXES.append(".avif")
ALPHA_SUFFIXES = [suffix for suffix in SUFFIXES if suffix not in (".jpg", ".jpeg", ".bmp")]
LIGHT_GRAY = 204  # in Pillow's web palette, so that P needs no dithering


def _noise(mode="RGB", width=24, height=16, seed=0):
    channels = len(Image.new(mode, (1, 1)).getbands())
    bands = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(bands[..., 0] if channels == 1 else bands)


def _gray16(width=256, height=256):
    values = np.arange(width * height, dtype=np.uint16).reshape(height, width)
    return Image.fromarray(values)


def _huge_png(width, height, color=0, depth=1):
    """A PNG of few bytes that claims width × height pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", b""), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(starmap(png_chunk, chunks))


# --- reading ---


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_read_keeps_mode_and_pixels(mode, tmp_path):
    image = _noise("RGB").convert(mode)
    image.save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png")
    assert read.mode == mode
    np.testing.assert_array_equal(np.asarray(read.convert("RGBA")), image.convert("RGBA"))


def test_read_image_outlives_the_file(tmp_path):
    frames = [Image.new("L", (4, 4), value) for value in (10, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match=r"a\.gif holds 2 frames"):
        read = read_image(str(tmp_path / "a.gif"))
    os.remove(tmp_path / "a.gif")
    assert decode_image(read).rgb.mean().item() == pytest.approx(10 / 255)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp", ".bmp"])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.3, 0.9])
def test_truncated_files(suffix, kept, tmp_path):
    path = tmp_path / f"cut{suffix}"
    _noise(width=200, height=200).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ImageReadError, match=rf"cut\{suffix}"):
        read_image(path)


def test_damaged_pixels(tmp_path):
    path = tmp_path / "bad.png"
    _noise(width=100, height=100).save(path)
    data = bytearray(path.read_bytes())
    data[100:400] = bytes(300)
    path.write_bytes(data)
    with pytest.raises(ImageReadError, match=r"bad\.png"):
        read_image(path)


def test_no_image_at_all(tmp_path):
    (tmp_path / "notes.png").write_text("not an image")
    (tmp_path / "file").write_text("")
    (tmp_path / "zero.png").write_bytes(_huge_png(0, 5))
    for name, message in [
        ("notes.png", "none that Pillow knows"),
        ("zero.png", r"zero\.png"),
        ("missing.png", "found none"),
        ("", "is a folder"),
        ("file/a.png", "found none"),
    ]:
        with pytest.raises(ImageReadError, match=message):
            read_image(tmp_path / name)


def test_programs_in_postscript_are_not_run(tmp_path, monkeypatch):
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    path = tmp_path / "photo.png"
    _noise().save(path, "EPS")
    with pytest.raises(ImageReadError, match="PostScript program"):
        read_image(path)
    assert not (tmp_path / "ran").exists()
    # What is refused is what would have run it.
    with Image.open(path) as image, suppress(OSError):
        image.load()
    assert (tmp_path / "ran").exists()


def test_decompression_bomb_in_pillows_eyes(tmp_path):
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


def test_what_costs_more_than_its_pixels_is_limited(tmp_path):
    image = Image.new("RGB", (16, 16))
    image.save(tmp_path / "a.jp2", no_jp2=True)
    data = (tmp_path / "a.jp2").read_bytes()
    start = data.index(b"\xff\x51") + 6
    size = struct.pack(">II", 6000, 6000)
    (tmp_path / "a.jp2").write_bytes(data[:start] + size + data[start + 8 :])
    with pytest.raises(ImageTooLargeError, match=r"at most 23860929 pixels"):
        read_image(tmp_path / "a.jp2")
    image.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[:33] + struct.pack(">I4sI", 0, b"teXt", 0) * 2**18)
    with pytest.raises(ImageReadError, match="262144 chunks"):
        read_image(tmp_path / "a.png")
    Image.new("L", (1, 70_000)).save(tmp_path / "a.tif", tiffinfo={278: 1}, strip_size=1)
    with pytest.raises(ImageTooLargeError, match="65536 strips"):
        read_image(tmp_path / "a.tif")


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


@pytest.mark.parametrize("mode", ["LA", "La", "RGBa", "PA"])
def test_transparency_in_rare_modes(mode):
    image = Image.new(mode, (3, 2), (9,) * (len(mode) - 1) + (255,))
    assert not is_see_through(image)
    image.putpixel((1, 1), (0,) * len(mode))
    assert is_see_through(image)


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
    _noise(width=5, height=4).save(tmp_path / "small.png")
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
    image = _noise(width=24, height=16)
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
    frames = [_noise(seed=seed) for seed in range(3)]
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
    assert read_image(path, max_pixels=200_000_000).getextrema() == (255, 255)


# --- writing ---


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".gif"])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "I;16", "I", "F"])
def test_every_opaque_mode_in_every_format(mode, suffix, tmp_path):
    gray = Image.fromarray(np.full((16, 24), LIGHT_GRAY * 257, np.uint16))
    colors = {
        "I;16": gray,
        "I": gray.convert("I"),
        "F": Image.new("F", (24, 16), float(LIGHT_GRAY)),
    }
    rgb = Image.new("RGB", (24, 16), (LIGHT_GRAY if mode != "1" else 255,) * 3)
    image = colors.get(mode) or rgb.convert(mode)
    path = tmp_path / f"a{suffix}"
    write_image(image, path)
    with Image.open(path) as opened:
        assert opened.format in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "AVIF", "GIF")
    expected = decode_image(image).rgb.numpy()
    np.testing.assert_allclose(decode_image(read_image(path)).rgb.numpy(), expected, atol=0.012)


@pytest.mark.parametrize("suffix", ALPHA_SUFFIXES)
@pytest.mark.parametrize("mode", ["LA", "PA", "RGBA", "RGBa", "P"])
def test_every_alpha_mode_where_it_fits(mode, suffix, tmp_path):
    image = Image.new("RGBA", (16, 16), (LIGHT_GRAY,) * 3 + (128,))
    if mode == "P":
        image = image.convert("RGB").convert("P")
        image.info["transparency"] = bytes([128] * 256)
    elif mode == "PA":
        image = image.convert("RGB").convert("P")
        image.putalpha(128)  # Pillow 11.3 forgets it where RGBA is converted
    else:
        image = image.convert(mode)
    write_image(image, tmp_path / f"a{suffix}")
    decoded = decode_image(read_image(tmp_path / f"a{suffix}"))
    np.testing.assert_allclose(decoded.alpha.numpy(), 128 / 255, atol=0.012)
    np.testing.assert_allclose(decoded.rgb.numpy(), LIGHT_GRAY / 255, atol=0.012)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_file_round_trip_is_exact(suffix, tmp_path):
    image = _gray16()
    write_image(image, tmp_path / f"a{suffix}")
    decoded = decode_image(read_image(tmp_path / f"a{suffix}"))
    result = encode_image(decoded.rgb, decoded.alpha, decoded)
    assert result.mode == "I;16"
    np.testing.assert_array_equal(np.asarray(result), np.asarray(image))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_lossless_formats_are_exact(mode, suffix, tmp_path):
    image = _noise(mode)
    write_image(image, tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / f"a{suffix}")), image)


def test_profile_of_another_color_space_is_not_written(tmp_path):
    image = _noise("L")
    image.info["icc_profile"] = SRGB_ICC
    write_image(image, tmp_path / "a.png")
    assert "icc_profile" not in read_image(tmp_path / "a.png").info


def test_quality(tmp_path):
    image = _noise(width=64, height=64)
    for suffix in (".jpg", ".webp"):
        sizes = []
        for quality in (1, None, 100):
            write_image(image, tmp_path / f"q{suffix}", quality=quality)
            sizes.append((tmp_path / f"q{suffix}").stat().st_size)
        assert sizes == sorted(set(sizes))
    write_image(image, tmp_path / "q.png", quality=1)
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "q.png")), image)


def test_jpeg_keeps_full_color_resolution(tmp_path):
    stripes = np.zeros((16, 16, 3), np.uint8)
    stripes[:, ::2, 0] = stripes[:, 1::2, 2] = 255
    write_image(Image.fromarray(stripes), tmp_path / "a.jpg")
    read = np.asarray(read_image(tmp_path / "a.jpg")).astype(int)
    assert np.abs(read - stripes).mean() < 12  # about 60 with halved colour


@pytest.mark.parametrize("name", ["webp", "WebP", "WEBP"])
def test_format_overrides_the_suffix(name, tmp_path):
    write_image(_noise(), tmp_path / "a.tmp", format=name)
    with Image.open(tmp_path / "a.tmp") as opened:
        assert opened.format == "WEBP"


def test_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    _noise(seed=1).save(tmp_path / "real" / "a.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "real" / "a.png")
    write_image(_noise(seed=2), tmp_path / "link.png")
    assert (tmp_path / "link.png").is_symlink()
    np.testing.assert_array_equal(
        np.asarray(read_image(tmp_path / "real" / "a.png")), _noise(seed=2)
    )


def test_new_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "plain").touch()
    write_image(_noise(), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.xcf", {}, r"\.png .*\.tiff"),
        ("a", {}, "no suffix"),
        ("a.png", {"format": "xcf"}, "xcf"),
        ("missing/a.png", {}, "create it first"),
        ("file/a.png", {}, "create it first"),
        ("folder.png", {}, "is a folder"),
        ("taken.png", {"overwrite": False}, "overwrite=True"),
    ],
)
def test_unwritable_places(name, options, message, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "taken.png").write_text("precious")
    before = sorted(tmp_path.iterdir())
    for call in (check_writable, lambda path, **kw: write_image(_noise(), path, **kw)):
        with pytest.raises(ImageWriteError, match=message):
            call(tmp_path / name, **options)
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "taken.png").read_text() == "precious"


@pytest.mark.skipif(sys.platform == "win32", reason="names are counted in another way")
@pytest.mark.parametrize("letter", ["a", "ä"])
def test_names_that_the_file_system_does_not_take(letter, tmp_path):
    name = letter * (251 // len(letter.encode()))
    check_writable(tmp_path / f"{name}.png")
    write_image(_noise(), tmp_path / f"{name}.png")
    with pytest.raises(ImageWriteError, match=r"takes, but has 256 bytes; choose a shorter"):
        check_writable(tmp_path / f"{name}{letter}.png")


def test_pillow_without_avif_is_told(tmp_path, monkeypatch):
    head = b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf"
    (tmp_path / "a.avif").write_bytes(head + bytes(100))
    Image.init()
    monkeypatch.delitem(Image.SAVE, "AVIF", raising=False)
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "AVIF"])
    files._writable_suffixes.cache_clear()
    try:
        with pytest.raises(ImageWriteError, match=r"cannot write AVIF.* pip install -U pillow"):
            check_writable(tmp_path / "b.avif")
        with pytest.raises(ImageReadError, match=r"cannot read AVIF.* pip install -U pillow"):
            read_image(tmp_path / "a.avif")
    finally:
        files._writable_suffixes.cache_clear()


def test_check_writable_writes_nothing(tmp_path):
    for suffix in SUFFIXES:
        check_writable(tmp_path / f"a{suffix}", overwrite=False, size=(16383, 16383))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".jpg", ".bmp"])
@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha_is_refused_rather_than_flattened(mode, suffix, tmp_path):
    with pytest.raises(ImageWriteError, match="PNG or WebP"):
        check_writable(tmp_path / f"a{suffix}", has_alpha=True)
    with pytest.raises(ImageWriteError, match="PNG or WebP"):
        write_image(_noise(mode), tmp_path / f"a{suffix}")
    assert not list(tmp_path.iterdir())


def test_side_too_long_for_the_format(tmp_path):
    with pytest.raises(ImageWriteError, match=r"16384×1 px, but WEBP holds at most 16383"):
        write_image(Image.new("L", (16384, 1)), tmp_path / "a.webp")
    with pytest.raises(ImageWriteError, match="65500"):
        check_writable(tmp_path / "a.jpg", size=(1, 65501))


@pytest.mark.parametrize(
    ("image", "quality", "error"),
    [
        (np.zeros((4, 4, 3), np.uint8), None, TypeError),
        (Image.new("L", (1, 1)), 0, ValueError),
        (Image.new("L", (1, 1)), 101, ValueError),
        (Image.new("L", (1, 1)), 90.0, TypeError),
        (Image.new("L", (1, 1)), True, TypeError),
        (Image.new("I", (1, 1), 70000), None, ValueError),
    ],
)
def test_wrong_arguments(image, quality, error, tmp_path):
    with pytest.raises(error):
        write_image(image, tmp_path / "a.png", quality=quality)
    assert not list(tmp_path.iterdir())


def test_failed_write_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "a.png"
    write_image(_noise(seed=1), path)
    old = path.read_bytes()
    # Pillow's encoders refuse an image without pixels, after the file has been opened
    with pytest.raises(ImageWriteError, match="cannot be written"):
        write_image(Image.new("RGB", (0, 0)), path, format="jpeg")
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["a.png"]


def test_interrupted_write_leaves_nothing_behind(tmp_path):
    script = (
        "import os, signal, sys, threading, time\n"
        "import numpy as np\n"
        "from PIL import Image\n"
        "from tadsr.images import write_image\n"
        "def interrupt():\n"
        "    while not os.listdir(sys.argv[1]):\n"
        "        time.sleep(0.001)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "noise = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), np.uint8)\n"
        "image = Image.fromarray(noise)\n"
        "threading.Thread(target=interrupt).start()\n"
        "write_image(image, sys.argv[1] + '/a.png')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert "KeyboardInterrupt" in done.stderr
    assert done.returncode in (-signal.SIGINT, 1, 130)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".jpg", ".bmp"])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_alpha_that_is_opaque_everywhere_is_no_obstacle(mode, suffix, tmp_path):
    image = Image.new("RGBA", (8, 6), (90, 90, 90, 255)).convert(mode)
    if mode == "P":
        image.info["transparency"] = bytes([255] * 256)
    write_image(image, tmp_path / f"a{suffix}")
    with Image.open(tmp_path / f"a{suffix}") as found:
        assert found.mode == "RGB" if mode != "LA" else found.mode in ("L", "RGB")
        assert np.abs(np.asarray(found.convert("RGB")).astype(int) - 90).max() <= 2


def test_a_palette_with_more_alphas_than_colours_is_read(tmp_path):
    Image.new("P", (4, 4)).save(tmp_path / "a.png", transparency=b"\0")
    data = (tmp_path / "a.png").read_bytes()
    at = data.index(b"tRNS") - 4
    end = at + 12 + int.from_bytes(data[at : at + 4], "big")
    (tmp_path / "a.png").write_bytes(data[:at] + png_chunk(b"tRNS", bytes(300)) + data[end:])
    assert decode_image(read_image(tmp_path / "a.png")).alpha.max() == 0
