import os
import signal
import sys
import time
from contextlib import suppress

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, features

from tadsr.errors import ImageReadError, ImageWriteError
from tadsr.images import (
    check_writable,
    decode_image,
    files,
    is_see_through,
    read_image,
    write_image,
)

from .samples import SRGB_ICC, noise, png_chunk, round_trip

SUFFIXES = [".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp"]
if features.check("avif"):
    SUFFIXES.append(".avif")
ALPHA_SUFFIXES = [suffix for suffix in SUFFIXES if suffix not in (".jpg", ".jpeg", ".bmp")]
LIGHT_GRAY = 204  # in Pillow's web palette, so that P needs no dithering


# --- reading ---


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_read_keeps_mode_and_pixels(mode, tmp_path):
    image = noise("RGB").convert(mode)
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
    noise(width=200, height=200).save(path)
    data = path.read_bytes()
    damaged = data[:100] + bytes(300) + data[400:]
    for content in (data[: int(len(data) * kept)], *([damaged] if suffix == ".png" else [])):
        path.write_bytes(content)
        with pytest.raises(ImageReadError, match=rf"cut\{suffix}"):
            read_image(path)


def test_no_image_at_all(tmp_path):
    (tmp_path / "notes.png").write_text("not an image")
    (tmp_path / "file").write_text("")
    for name, message in [
        ("notes.png", "none that Pillow knows"),
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
    noise().save(path, "EPS")
    with pytest.raises(ImageReadError, match="PostScript program"):
        read_image(path)
    assert not (tmp_path / "ran").exists()
    # What is refused is what would have run it.
    with Image.open(path) as image, suppress(OSError):
        image.load()
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("mode", ["LA", "La", "RGBa", "PA"])
def test_transparency_in_rare_modes(mode):
    image = Image.new(mode, (3, 2), (9,) * (len(mode) - 1) + (255,))
    assert not is_see_through(image)
    image.putpixel((1, 1), (0,) * len(mode))
    assert is_see_through(image)


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


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
@pytest.mark.parametrize("mode", ["L", "RGB", "I;16"])
def test_lossless_formats_are_exact(mode, suffix, tmp_path):
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    image = Image.fromarray(every) if mode == "I;16" else noise(mode)
    write_image(image, tmp_path / f"a{suffix}")
    result = round_trip(read_image(tmp_path / f"a{suffix}"))
    if (mode, suffix) == ("I;16", ".bmp"):
        image = Image.fromarray(np.uint8(np.floor(every / 257 + 0.5)))
    assert result.mode == image.mode
    np.testing.assert_array_equal(np.asarray(result), image)


def test_profile_of_another_color_space_is_not_written(tmp_path):
    image = noise("L")
    image.info["icc_profile"] = SRGB_ICC
    write_image(image, tmp_path / "a.png")
    assert "icc_profile" not in read_image(tmp_path / "a.png").info


def test_quality(tmp_path):
    image = noise(width=64, height=64)
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
    write_image(noise(), tmp_path / "a.tmp", format=name)
    with Image.open(tmp_path / "a.tmp") as opened:
        assert opened.format == "WEBP"


def test_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    noise(seed=1).save(tmp_path / "real" / "a.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "real" / "a.png")
    write_image(noise(seed=2), tmp_path / "link.png")
    assert (tmp_path / "link.png").is_symlink()
    np.testing.assert_array_equal(
        np.asarray(read_image(tmp_path / "real" / "a.png")), noise(seed=2)
    )


def test_new_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "plain").touch()
    write_image(noise(), tmp_path / "a.png")
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
    for call in (check_writable, lambda path, **kw: write_image(noise(), path, **kw)):
        with pytest.raises(ImageWriteError, match=message):
            call(tmp_path / name, **options)
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "taken.png").read_text() == "precious"


@pytest.mark.skipif(sys.platform == "win32", reason="names are counted in another way")
@pytest.mark.parametrize("letter", ["a", "ä"])
def test_names_that_the_file_system_does_not_take(letter, tmp_path):
    name = letter * (251 // len(letter.encode()))
    check_writable(tmp_path / f"{name}.png")
    write_image(noise(), tmp_path / f"{name}.png")
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
        write_image(noise(mode), tmp_path / f"a{suffix}")
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
    write_image(noise(seed=1), path)
    old = path.read_bytes()
    # Pillow's encoders refuse an image without pixels, after the file has been opened
    with pytest.raises(ImageWriteError, match="cannot be written"):
        write_image(Image.new("RGB", (0, 0)), path, format="jpeg")
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["a.png"]


def test_interrupted_write_leaves_nothing_behind(tmp_path):
    image = noise(width=1000, height=1000)
    child = os.fork()
    if child == 0:
        try:
            write_image(image, tmp_path / "a.png")
        except KeyboardInterrupt:
            os._exit(130)
        finally:
            os._exit(1)
    while not os.listdir(tmp_path):
        time.sleep(0.001)
    os.kill(child, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
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
