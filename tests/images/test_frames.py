import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageDraw

from tadsr.errors import ImageReadError, ImageWriteError
from tadsr.images import (
    Animation,
    count_frames,
    find_losses,
    is_see_through,
    read_frames,
    read_image,
    write_frames,
)

from .samples import SRGB_ICC

DURATIONS = (50.0, 120.0, 200.0)
SUFFIXES = [".gif", ".png", ".apng", ".webp"]
COLORS = [(250, 20, 10), (10, 240, 30), (20, 30, 230)]


def _frames(mode="RGB", size=(16, 12)):
    """A disc that moves over nothing, or over grey."""
    frames = []
    for number, color in enumerate(COLORS):
        frame = Image.new(mode, size, (90, 90, 90, 0)[: len(mode)])
        box = (4 * number, 2, 4 * number + 7, 9)
        ImageDraw.Draw(frame).ellipse(box, fill=(*color, 255)[: len(mode)])
        frames.append(frame)
    return frames


def _shown(frame):
    return np.asarray(Image.alpha_composite(Image.new("RGBA", frame.size), frame.convert("RGBA")))


@pytest.mark.parametrize("num_plays", [0, 1, 5])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_frames_durations_and_plays_come_back(suffix, mode, num_plays, tmp_path):
    path = tmp_path / f"a{suffix}"
    frames = _frames(mode)
    write_frames(frames, path, durations_ms=DURATIONS, num_plays=num_plays, quality=100)
    animation = read_frames(path)
    assert (animation.size, animation.durations_ms) == ((16, 12), DURATIONS)
    assert animation.num_plays == num_plays
    assert animation.has_transparency_data == (mode == "RGBA")
    assert len(animation) == count_frames(path) == 3
    tolerance = 8 if suffix == ".webp" else 0  # colour at half the resolution
    for _ in range(2):  # it can be read again
        for found, frame in zip(animation, frames, strict=True):
            assert found.mode == mode
            assert np.abs(_shown(found).astype(int) - _shown(frame)).mean() <= tolerance


@pytest.mark.parametrize("is_stripped", [False, True])
@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_an_animation_on_its_side_is_turned_once(suffix, is_stripped, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "Camera"
    first, *others = _frames()
    options = {"save_all": True, "append_images": others, "exif": exif}
    first.save(tmp_path / f"a{suffix}", lossless=True, **options)
    animation = read_frames(tmp_path / f"a{suffix}")
    animation = animation.strip_metadata() if is_stripped else animation
    assert animation.size == (12, 16)
    write_frames(animation, tmp_path / "b.png", durations_ms=DURATIONS)
    result = read_frames(tmp_path / "b.png")
    assert result.size == (12, 16)
    assert ("exif" in result.info) is not is_stripped
    for found, frame in zip(result, _frames(), strict=True):
        assert found.size == (12, 16)
        assert np.abs(_shown(found).astype(int) - np.rot90(_shown(frame), -1)).mean() < 1


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_metadata_of_an_animation(suffix, tmp_path):
    frames = _frames()
    exif = Image.Exif()
    exif[0x10F] = "Camera"
    frames[0].info |= {"icc_profile": SRGB_ICC, "exif": exif.tobytes(), "xmp": b"<x:xmpmeta/>"}
    write_frames(frames, tmp_path / f"a{suffix}", durations_ms=DURATIONS)
    animation = read_frames(tmp_path / f"a{suffix}")
    with Image.open(tmp_path / f"a{suffix}") as opened:
        assert opened.getexif()[0x10F] == "Camera"
    assert animation.info["icc_profile"] == SRGB_ICC
    assert animation.info["xmp"] == b"<x:xmpmeta/>"
    assert next(iter(animation)).info == animation.info
    assert animation.strip_metadata().info == {"icc_profile": SRGB_ICC}


@pytest.mark.parametrize("disposal", [0, 1, 2, 3])
def test_what_a_gif_leaves_standing_is_in_the_next_frame(disposal, tmp_path):
    """Frames that cover a part only, put together by hand."""
    palette = b"".join(bytes(color) for color in [(0, 0, 0), *COLORS])
    data = b"GIF89a" + struct.pack("<HHBBB", 8, 4, 0b10000001, 0, 0) + palette
    for number in range(2):
        control = struct.pack("<BHB", disposal << 2 | 1, 10, 0)  # entry 0 is transparent
        data += b"!\xf9\x04" + control + b"\0"
        data += b"," + struct.pack("<HHHHB", 4 * number, 0, 4, 4, 0)
        codes = ""
        for _ in range(8):  # a clear code before every two pixels keeps codes at three bits
            codes += "".join(f"{code:03b}"[::-1] for code in (4, number + 1, number + 1))
        codes += f"{5:03b}"[::-1]
        packed = bytes(int(codes[i : i + 8][::-1], 2) for i in range(0, len(codes), 8))
        data += bytes([2, len(packed)]) + packed + b"\0"
    (tmp_path / "parts.gif").write_bytes(data + b";")
    first, second = (
        np.asarray(frame.convert("RGBA")) for frame in read_frames(tmp_path / "parts.gif")
    )
    assert (first[:, :4, :3] == COLORS[0]).all()
    assert (second[:, 4:, :3] == COLORS[1]).all()
    stays = disposal in (0, 1)
    assert (second[:, :4, 3] == (255 if stays else 0)).all()
    assert not stays or (second[:, :4, :3] == COLORS[0]).all()


def test_gif_plays(tmp_path):
    frames = _frames()
    for loop, num_plays in ((None, 1), (0, 0), (4, 5)):
        options = {} if loop is None else {"loop": loop}
        frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], **options)
        assert read_frames(tmp_path / "a.gif").num_plays == num_plays


def test_the_still_picture_of_an_apng_is_no_frame(tmp_path):
    frames = _frames()
    Image.new("RGB", (16, 12), "white").save(
        tmp_path / "a.png",
        save_all=True,
        append_images=frames,
        default_image=True,
        duration=DURATIONS,
    )
    animation = read_frames(tmp_path / "a.png")
    assert animation.durations_ms == DURATIONS
    np.testing.assert_array_equal(_shown(next(iter(animation))), _shown(frames[0]))


def test_apng_is_a_sound_png(tmp_path):
    """All chunks by the book: lengths, checksums, order and running numbers."""
    write_frames(_frames(size=(300, 200)), tmp_path / "a.png", durations_ms=(50, 33.3, 1e8))
    data = (tmp_path / "a.png").read_bytes()
    place, kinds, numbers, delays = 8, [], [], []
    while place < len(data):
        (length,) = struct.unpack_from(">I", data, place)
        kind, content = data[place + 4 : place + 8], data[place + 8 : place + 8 + length]
        (checksum,) = struct.unpack_from(">I", data, place + 8 + length)
        assert checksum == zlib.crc32(kind + content)
        kinds.append(kind)
        if kind in (b"fcTL", b"fdAT"):
            numbers += struct.unpack_from(">I", content)
        if kind == b"fcTL":
            delays.append(struct.unpack_from(">HH", content, 20))
        place += 12 + length
    assert kinds[:3] == [b"IHDR", b"acTL", b"fcTL"]
    assert kinds[-1] == b"IEND"
    assert kinds.count(b"fcTL") == 3
    assert kinds.index(b"IDAT") < kinds.index(b"fdAT")
    assert numbers == list(range(len(numbers)))
    assert delays[0] == (1, 20)
    assert delays[1] == (333, 10000)
    assert delays[2] == (65535, 1)


def test_apng_takes_frames_one_by_one(tmp_path):
    alive = []

    def frames():
        for frame in _frames():
            alive.append(len(alive))
            yield frame
            # The one before is in the file before the next is asked for.
            assert next(tmp_path.glob(".tadsr-*"), None) is not None or len(alive) == 1

    write_frames(frames(), tmp_path / "a.png", durations_ms=DURATIONS)
    assert len(alive) == 3


def test_black_does_not_become_transparent_in_a_gif(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 4), np.uint8)
    noise[..., 3] = 255
    noise[:32, :, :3] = 0
    noise[0, 0, 3] = 127
    write_frames(
        [Image.fromarray(noise), Image.new("RGBA", (64, 64))],
        tmp_path / "a.gif",
        durations_ms=(10, 10),
    )
    alpha = np.asarray(next(iter(read_frames(tmp_path / "a.gif"))))[..., 3]
    assert (alpha == 0).sum() == 1


def test_a_still_image_is_one_frame(tmp_path):
    Image.new("L", (3, 2), 7).save(tmp_path / "a.jpg")
    assert count_frames(tmp_path / "a.jpg") == 1
    animation = read_frames(tmp_path / "a.jpg")
    assert animation.durations_ms == (0,)
    assert [frame.size for frame in animation] == [(3, 2)]
    assert isinstance(animation, Animation)
    assert animation == read_frames(tmp_path / "a.jpg")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_one_frame_is_a_still_image(suffix, tmp_path):
    write_frames(_frames()[:1], tmp_path / f"a{suffix}", durations_ms=[40])
    assert count_frames(tmp_path / f"a{suffix}") == 1
    assert read_frames(tmp_path / f"a{suffix}").size == (16, 12)


def test_pages_of_a_tiff_are_no_frames(tmp_path):
    frames = _frames()
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    assert count_frames(tmp_path / "a.tif") == 1
    assert "several pages" in find_losses(tmp_path / "a.tif")[0]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_truncated_animations(suffix, tmp_path):
    path = tmp_path / f"cut{suffix}"
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)) for _ in range(3)]
    write_frames(noise, path, durations_ms=DURATIONS)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ImageReadError, match=rf"cut\{suffix}"):
        list(read_frames(path))


def test_refused_animations(tmp_path):
    write_frames(_frames(), tmp_path / "a.gif", durations_ms=DURATIONS)
    with pytest.raises(ImageReadError, match="max_pixels"):
        read_frames(tmp_path / "a.gif", max_pixels=16 * 12 - 1)
    with pytest.raises(ImageReadError, match="found none"):
        read_frames(tmp_path / "missing.gif")
    before = (tmp_path / "a.gif").read_bytes()
    for path, frames, durations, error, message in [
        ("a.gif", [], [], ValueError, "at least one"),
        ("a.gif", _frames(), DURATIONS[:2], ValueError, "zip"),
        ("a.gif", _frames()[:2], DURATIONS, ValueError, "zip"),
        ("a.png", _frames()[:2], DURATIONS, ValueError, "zip"),
        ("a.jpg", _frames(), DURATIONS, ImageWriteError, "animation of 3 frames; write .png"),
        ("a.gif", [_frames()[0], Image.new("RGB", (3, 3))], (1, 1), ImageWriteError, "one size"),
        ("a.webp", [Image.new("RGB", (16384, 1))] * 2, (1, 1), ImageWriteError, "16383"),
    ]:
        with pytest.raises(error, match=message):
            write_frames(frames, tmp_path / path, durations_ms=durations)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gif"]
    assert (tmp_path / "a.gif").read_bytes() == before


def test_gray_and_wide_frames(tmp_path):
    frames = [Image.fromarray(np.full((4, 5), v, np.uint16)) for v in (0, 65535)]
    write_frames(frames, tmp_path / "a.png", durations_ms=(10, 10))
    black, white = read_frames(tmp_path / "a.png")
    assert black.getextrema() == ((0, 0),) * 3
    assert white.getextrema() == ((255, 255),) * 3


@pytest.mark.parametrize(
    ("durations", "expected"),
    [
        ((33.3, 33.3, 33.3), (30, 40, 30)),
        ((16.7, 16.7, 16.7), (20, 20, 20)),
        ((5, 104, 0), (20, 90, 20)),
        ((1e9, 20, 30), (655_350, 20, 30)),
    ],
)
def test_gif_keeps_time_in_hundredths(durations, expected, tmp_path):
    write_frames(_frames()[:3], tmp_path / "a.gif", durations_ms=durations)
    assert read_frames(tmp_path / "a.gif").durations_ms == expected


@pytest.mark.parametrize("mode", ["P", "RGB", "L"])
def test_one_transparent_pixel_below_is_found(mode, tmp_path, monkeypatch):
    monkeypatch.setattr("tadsr.images.array_image._STRIP_PIXELS", 20)
    image = Image.new(mode, (10, 7), 1 if mode != "RGB" else (1, 1, 1))
    if mode == "P":
        image.putpalette(bytes(range(9)))
    for value, is_there in ((1, False), (2, True)):
        image.putpixel((9, 6), value if mode != "RGB" else (value,) * 3)
        image.save(tmp_path / "a.png", transparency=2 if mode != "RGB" else (2, 2, 2))
        assert is_see_through(read_image(tmp_path / "a.png")) is is_there
