import itertools
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from tadsr.errors import ImageReadError, ImageReadWarning
from tadsr.images import ArrayImage, read_image, strip_metadata, write_image
from tadsr.measure.pictures import read_rgb8
from tadsr.quick import open_quickly

from .samples import SRGB_ICC, png_chunk, round_trip

ADAM7 = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2)]
ADAM7 += [(1, 0, 2, 1)]  # first row and column, steps down and across
COLOR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}
TURNS = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: np.rot90(np.fliplr(a)),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(np.fliplr(a), -1),
    8: np.rot90,
}


def _noise16(height=13, width=11, channels=3, seed=0):
    shape = (height, width, channels)
    return np.random.default_rng(seed).integers(0, 65536, shape).astype(np.uint16)


def _filtered(rows, seed):
    """Rows of bytes by PNG's five filters in turn."""
    height, length, step = rows.shape[0], rows.shape[1] * rows.shape[2] * 2, rows.shape[2] * 2
    raw = rows.astype(">u2").view(np.uint8).reshape(height, length).astype(int)
    lines = []
    for y in range(height):
        left = np.concatenate([np.zeros(step, int), raw[y, :-step]])
        up = raw[y - 1] if y else np.zeros(length, int)
        corner = np.concatenate([np.zeros(step, int), up[:-step]])
        guess = left + up - corner
        nearest = np.where(np.abs(guess - up) <= np.abs(guess - corner), up, corner)
        is_left = (np.abs(guess - left) <= np.abs(guess - up)) & (
            np.abs(guess - left) <= np.abs(guess - corner)
        )
        paeth = np.where(is_left, left, nearest)
        kind = (y + seed) % 5
        line = raw[y] - [0, left, up, (left + up) // 2, paeth][kind]
        lines.append(bytes([kind]) + (line % 256).astype(np.uint8).tobytes())
    return b"".join(lines)


def _write_png(path, pixels, *, is_interlaced=False, chunks=(), seed=0):
    """Write a 16 bit PNG without any library."""
    height, width, channels = pixels.shape
    color_type = COLOR_TYPES[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, is_interlaced)
    parts = [pixels[r::dr, c::dc] for r, c, dr, dc in ADAM7] if is_interlaced else [pixels]
    data = b"".join(_filtered(part, seed) for part in parts if part.size)
    chunks = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(itertools.starmap(png_chunk, chunks)))


# --- PNG ---


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 17),
    width=st.integers(1, 17),
    channels=st.integers(2, 4),
    is_interlaced=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_16_bit_png_is_read_exactly(
    height, width, channels, is_interlaced, seed, tmp_path_factory
):
    pixels = _noise16(height, width, channels, seed)
    path = tmp_path_factory.getbasetemp() / "any.png"
    _write_png(path, pixels, is_interlaced=is_interlaced, seed=seed)
    read = read_image(path)
    assert isinstance(read, ArrayImage)
    np.testing.assert_array_equal(read.pixels, pixels)


def test_16_bit_gray_stays_a_pil_image(tmp_path):
    pixels = _noise16(channels=1)
    _write_png(tmp_path / "gray.png", pixels)
    read = read_image(tmp_path / "gray.png")
    assert read.mode == "I;16"
    np.testing.assert_array_equal(np.asarray(read), pixels[..., 0])


@pytest.mark.parametrize("channels", [1, 3])
def test_transparent_color_is_compared_at_full_precision(channels, tmp_path):
    pixels = np.full((2, 3, channels), 0x1234, np.uint16)
    pixels[0, 0] = 0x1235  # the same to eight bits
    key = struct.pack(f">{channels}H", *[0x1235] * channels)
    _write_png(tmp_path / "key.png", pixels, chunks=[(b"tRNS", key)])
    read = read_image(tmp_path / "key.png")
    assert read.pixels.shape == (2, 3, channels + 1)
    np.testing.assert_array_equal(read.pixels[..., :-1], pixels)
    assert read.pixels[..., -1].tolist() == [[0, 65535, 65535], [65535] * 3]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_gamma_and_chromaticities_become_a_profile(suffix, tmp_path):
    white = (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
    chunks = [(b"gAMA", struct.pack(">I", 100_000)), (b"cHRM", struct.pack(">8I", *white))]
    _write_png(tmp_path / "linear.png", np.full((2, 3, 3), 0x3737, np.uint16), chunks=chunks)
    image = read_image(tmp_path / "linear.png")
    for result in (round_trip(image), strip_metadata(image)):
        write_image(result, tmp_path / f"out{suffix}")
        # Linear 0.216 is 0.5 in sRGB.
        seen = read_rgb8(tmp_path / f"out{suffix}")
        assert np.abs(seen.astype(int) - 128).max() <= 2


@pytest.mark.parametrize("kept", [0.3, 0.9])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_truncated_16_bit_files(suffix, kept, tmp_path):
    path = tmp_path / f"cut{suffix}"
    write_image(ArrayImage(_noise16(200, 200)), path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(ImageReadError, match=rf"cut\{suffix}"):
        read_image(path)


# --- TIFF ---


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("tile", [None, (16, 16)])
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_every_16_bit_tiff_is_read_exactly(channels, compression, tile, byteorder, tmp_path):
    pixels = _noise16(40, 50, channels)
    tifffile.imwrite(
        tmp_path / "a.tif",
        pixels if channels > 1 else pixels[..., 0],
        photometric="rgb" if channels > 2 else "minisblack",
        extrasamples=["unassalpha"] if channels in (2, 4) else None,
        planarconfig="contig" if channels > 1 else None,
        compression=compression,
        predictor=compression is not None,
        tile=tile,
        byteorder=byteorder,
    )
    read = read_image(tmp_path / "a.tif")
    found = np.asarray(read)[..., None] if channels == 1 else read.pixels
    np.testing.assert_array_equal(found, pixels)


def test_lzw_colors(tmp_path):
    """LZW, the commonest compression of scans, which tifffile alone cannot read."""
    pixels = _noise16(5, 60, 3)
    bits, free = "", 0
    for byte in pixels.tobytes():
        if free == 0:
            bits, free = bits + f"{256:09b}", 250  # a new table, before its codes get longer
        bits, free = bits + f"{byte:09b}", free - 1
    bits += f"{257:09b}"
    packed = bytes(int(bits[i : i + 8].ljust(8, "0"), 2) for i in range(0, len(bits), 8))
    entries = [(256, 3, 1, 60), (257, 3, 1, 5), (258, 3, 3, 8), (259, 3, 1, 5), (262, 3, 1, 2)]
    entries += [(273, 4, 1, 14), (277, 3, 1, 3), (278, 3, 1, 5), (279, 4, 1, len(packed))]
    packed += bytes(len(packed) % 2)
    (tmp_path / "lzw.tif").write_bytes(
        struct.pack("<2sHIHHH", b"II", 42, 14 + len(packed), 16, 16, 16)
        + packed
        + struct.pack("<H", len(entries))
        + b"".join(struct.pack("<HHII", *entry) for entry in entries)
        + bytes(4)
    )
    np.testing.assert_array_equal(read_image(tmp_path / "lzw.tif").pixels, pixels)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_compressed_gray_tiff(compression, tmp_path):
    pixels = _noise16(40, 50, 1)[..., 0]
    Image.fromarray(pixels).save(tmp_path / "a.tif", compression=compression)
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "a.tif")), pixels)


def test_planes_apart(tmp_path):
    pixels = _noise16(40, 50, 3)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.moveaxis(pixels, 2, 0), photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(read_image(path).pixels, pixels)


def test_premultiplied_alpha_is_divided_out(tmp_path):
    pixels = np.array([[[10000, 20000, 0, 40000], [0, 0, 0, 0]]], np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", extrasamples=["assocalpha"])
    found = read_image(tmp_path / "a.tif").pixels
    assert found.tolist() == [[[16384, 32768, 0, 40000], [0, 0, 0, 0]]]


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_white_may_be_zero(photometric, tmp_path):
    pixels = _noise16(4, 5, 1)[..., 0]
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric=photometric)
    expected = pixels if photometric == "minisblack" else 65535 - pixels
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "a.tif")), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "rgb", "gray alpha"])
def test_16_bit_files_are_turned_upright(kind, orientation, tmp_path):
    pixels = _noise16(5, 7, 2 if kind == "gray alpha" else 3)
    path = tmp_path / f"a.{'png' if kind == 'png' else 'tif'}"
    if kind == "png":
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        exif[ExifTags.Base.Make] = "Camera"
        _write_png(path, pixels, chunks=[(b"eXIf", exif.tobytes()[6:])])
    else:
        tifffile.imwrite(
            path,
            pixels,
            photometric="rgb" if kind == "rgb" else "minisblack",
            planarconfig="contig",
            extrasamples=None if kind == "rgb" else ["unassalpha"],
            extratags=[(274, 3, 1, orientation, True), (271, 2, 0, "Camera", True)],
        )
    read = read_image(path)
    np.testing.assert_array_equal(read.pixels, TURNS[orientation](pixels))
    exif = Image.Exif()
    exif.load(read.info["exif"])
    assert exif[ExifTags.Base.Make] == "Camera"
    assert exif.get(ExifTags.Base.Orientation, 1) == 1


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_float_tiff(channels, tmp_path):
    values = np.linspace(0, 1, 6 * 5 * channels, dtype=np.float32).reshape(6, 5, channels)
    image = ArrayImage(values)
    write_image(image, tmp_path / "a.tif")
    assert tifffile.imread(tmp_path / "a.tif").dtype == np.float32
    read = read_image(tmp_path / "a.tif")
    np.testing.assert_array_equal(read.pixels, values)
    np.testing.assert_allclose(round_trip(read).pixels, values, atol=2e-7)
    write_image(read, tmp_path / "a.png")
    sixteen = read_image(tmp_path / "a.png")
    sixteen = np.asarray(sixteen)[..., None] if channels == 1 else sixteen.pixels
    np.testing.assert_allclose(sixteen, values * 65535, atol=0.51)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_float_tiff_beyond_white_is_refused(value, channels, tmp_path):
    pixels = np.full((4, 4, channels), value, np.float32).squeeze()
    photometric = "rgb" if channels == 3 else "minisblack"
    tifffile.imwrite(tmp_path / "hdr.tif", pixels, photometric=photometric)
    with pytest.raises(ImageReadError, match=r"hdr\.tif: float pixels must be from 0 .* to 1"):
        read_image(tmp_path / "hdr.tif")


def test_other_samples_are_refused_in_a_sentence(tmp_path):
    tifffile.imwrite(tmp_path / "deep.tif", np.zeros((4, 4, 3), np.uint32), photometric="rgb")
    with pytest.raises(ImageReadError, match=r"8 or 16 bit, or float in \[0, 1\], got 3 × uint32"):
        read_image(tmp_path / "deep.tif")
    tifffile.imwrite(tmp_path / "big.tif", np.zeros((4, 4, 3), np.float32), photometric="rgb")
    with pytest.raises(ImageReadError, match="max_pixels"):
        read_image(tmp_path / "big.tif", max_pixels=15)


def test_a_tiff_of_two_widths_is_refused_in_a_sentence(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, _noise16(4, 5, 3), bigtiff=True, byteorder=">", planarconfig="contig")
    with tifffile.TiffFile(path) as file:
        count = file.pages[0].tags["ImageWidth"].offset + 4
    data = bytearray(path.read_bytes())
    data[count : count + 8] = struct.pack(">Q", 2)
    path.write_bytes(data)
    with pytest.raises(ImageReadError, match="must name one height, width"):
        read_image(path)


def test_further_pages_are_not_lost_silently(tmp_path):
    with tifffile.TiffWriter(tmp_path / "scan.tif") as writer:
        for value in (100, 200):
            writer.write(np.full((4, 5, 3), value, np.uint16), photometric="rgb")
    with pytest.warns(ImageReadWarning, match=r"scan\.tif holds several pages, of which the first"):
        read = read_image(tmp_path / "scan.tif")
    assert (read.pixels == 100).all()


# --- ArrayImage ---


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_array_image_round_trip(channels, dtype):
    pixels = _noise16(channels=channels)
    if dtype is np.float32:
        pixels = pixels.astype(np.float32) / 65535
    result = round_trip(ArrayImage(pixels, {"dpi": (300, 300), "comment": "not kept"}))
    assert result.pixels.dtype == dtype
    assert result.info == {"dpi": (300, 300)}
    tolerance = channels <= 2 if dtype is np.uint16 else 1e-6  # grey goes through luma
    np.testing.assert_allclose(result.pixels.astype(float), pixels.astype(float), atol=tolerance)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bit_files_round_trip(channels, suffix, tmp_path):
    pixels = _noise16(300, 270, channels)  # more than a tile
    write_image(ArrayImage(pixels, {"icc_profile": SRGB_ICC}), tmp_path / f"a{suffix}")
    read = read_image(tmp_path / f"a{suffix}")
    found = np.asarray(read)[..., None] if channels == 1 else read.pixels
    np.testing.assert_array_equal(found, pixels)
    assert ("icc_profile" in read.info) == (channels >= 3)


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".bmp"])
def test_16_bit_are_rounded_where_8_fit(suffix, tmp_path):
    flat = ArrayImage(np.full((16, 16, 3), 257 * 100 + 200, np.uint16))
    write_image(flat, tmp_path / f"a{suffix}")
    read = np.asarray(read_image(tmp_path / f"a{suffix}")).astype(int)
    assert np.abs(read - 101).max() <= 1  # truncated it would be 100
    assert read.mean() > 100.5


@pytest.mark.parametrize(
    ("pixels", "error"),
    [
        (np.zeros((4, 4, 3), np.uint8), TypeError),
        (np.zeros((4, 4, 3), np.float64), TypeError),
        ([[1]], TypeError),
        (np.zeros((4, 4), np.uint16), ValueError),
        (np.zeros((4, 4, 5), np.uint16), ValueError),
        (np.zeros((0, 4, 3), np.uint16), ValueError),
    ],
)
def test_wrong_pixels(pixels, error):
    with pytest.raises(error, match="pixels must be"):
        ArrayImage(pixels)


# --- the whole path ---


@pytest.fixture(scope="module")
def pipe():
    return open_quickly("tadsr-tiny", torch.float32, "auto")


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_16_bit_gradient_keeps_its_precision(suffix, pipe, tmp_path):
    ramp = np.linspace(20000, 22000, 64 * 32).round().astype(np.uint16)  # 8 steps of 8 bit
    pixels = np.repeat(ramp.reshape(32, 64, 1), 3, axis=2)
    write_image(ArrayImage(pixels), tmp_path / f"in{suffix}")
    image = read_image(tmp_path / f"in{suffix}")
    result = pipe(image, 1, scale=1, process_size=0)
    write_image(result, tmp_path / f"out{suffix}")
    pipe.upscale_to_file(image, tmp_path / f"strips{suffix}", 1, scale=1, process_size=0)
    for name in ("out", "strips"):
        found = read_image(tmp_path / f"{name}{suffix}").pixels
        assert found.dtype == np.uint16
        np.testing.assert_array_equal(found, result.pixels)
        assert len(np.unique(found[..., 1])) > 300
        assert (found % 257 != 0).mean() > 0.9  # no 8 bit in disguise


def test_scale_4_of_a_16_bit_image_is_the_float_result_rounded(pipe):
    pixels = _noise16(8, 9)
    result = pipe(ArrayImage(pixels), 1, process_size=0)
    exact = pipe(torch.from_numpy(pixels / 65535).permute(2, 0, 1).float(), 1, process_size=0)
    expected = exact.permute(1, 2, 0).numpy() * 65535
    assert result.size == (36, 32)
    np.testing.assert_allclose(result.pixels, expected, atol=0.51)


@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize("orientation", [1, 6])
def test_reading_takes_little_more_than_the_pixels(channels, orientation, tmp_path, monkeypatch):
    monkeypatch.setattr("tadsr.images.array_image._STRIP_PIXELS", 2**12)
    pixels = _noise16(240, 320, channels)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    _write_png(tmp_path / "a.png", pixels, chunks=[(b"eXIf", exif.tobytes()[6:])])
    tracemalloc.start()
    try:
        found = read_image(tmp_path / "a.png")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(found.pixels, TURNS[orientation](pixels))
    assert peak < 1.5 * pixels.nbytes
