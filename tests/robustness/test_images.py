"""Any array and any PIL image is upscaled to the right size or refused by one of our errors."""

import math
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image, ImageMode

import tadsr
from tadsr import TADSRError, TADSRPipeline
from tadsr.onestep import TileSpec

SEED = 0
QUICK, LONG = 300, 10_000
"""All cases; those of one test are a share of them."""
ARRAYS_SHARE, PIL_SHARE, SIZES_SHARE = 0.2, 0.17, 0.05
PACKAGE = str(Path(tadsr.__file__).parent)

INTEGER_DTYPES = ("u1", "<u2", ">u2")
FLOAT_DTYPES = ("<f2", ">f2", "<f4", ">f4", "<f8", ">f8")
REFUSED_DTYPES = (
    *("?", "i1", "i2", "i4", "i8", "u4", "u8", "g", "F", "D", "O", "S3", "U2", "V4", "M8[s]"),
    "i4,f4",
)
MODES = sorted(
    {"1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "PA", "RGBX"}
    | {"RGBa", "La", "I;16", "I;16L", "I;16B", "I;16N"}
)
JUNK = st.none() | st.integers(-9, 300) | st.binary(max_size=40) | st.text(max_size=9)
JUNK |= st.tuples(st.integers(0, 255), st.floats()) | st.lists(st.integers(), max_size=3)
INFO = st.dictionaries(
    st.sampled_from(
        [
            *("transparency", "icc_profile", "exif", "dpi", "xmp", "gamma", "chromaticity"),
            *("srgb", "duration", "loop"),
        ]
    ),
    JUNK | st.binary(max_size=30).map(lambda data: b"Exif\0\0II*\0\x08\0\0\0" + data),
    max_size=3,
)
EDGES = st.builds(lambda tiles, past: 128 * tiles + past, st.integers(1, 2), st.integers(-1, 1))
FIRST_EDGE = st.integers(127, 129)
SHORT = st.integers(1, 20)
EXTREMES = st.sampled_from([(1, 5000), (5000, 1), (1, 1), (2, 1500), (1500, 3)])
SIZES = st.tuples(EDGES, SHORT) | st.tuples(SHORT, EDGES) | st.tuples(FIRST_EDGE, FIRST_EDGE)
SPECS = [
    *("auto", None, TileSpec(), TileSpec(attention_px=128), TileSpec(attention_px=256)),
    TileSpec(band_bytes=2**18, max_memory=1, attention_px=0),
    TileSpec(band_bytes=2**18, attention_px=128),
]


@pytest.fixture(scope="module")
def pipe(model_dir):
    return TADSRPipeline.from_pretrained(model_dir)


@pytest.fixture(params=[QUICK, pytest.param(LONG, marks=pytest.mark.slow)])
def num_cases(request):
    return lambda share: round(share * request.param)


def search(num_examples: int, *strategies: st.SearchStrategy, **named: st.SearchStrategy) -> Any:
    """Try a test on so many examples: the same at every run, or replayed from what it prints."""

    def run(test):
        limits = {"max_examples": num_examples, "deadline": None, "print_blob": True}
        quick_enough = settings(**limits, suppress_health_check=list(HealthCheck))
        return seed(SEED)(quick_enough(given(*strategies, **named)(test)))()

    return run


def refused(pipe: TADSRPipeline, image: object, **options: object) -> Exception:
    """Return the error that an image is refused with, which must be one of ours."""
    with pytest.raises((TADSRError, ValueError, TypeError)) as caught:
        pipe(image, **options)
    last = traceback.extract_tb(caught.tb)[-1]
    assert last.filename.startswith(PACKAGE), caught.value
    assert "must" in str(caught.value) or "is not" in str(caught.value), caught.value
    return caught.value


@st.composite
def arrays(draw) -> np.ndarray:
    """Draw an array of any dtype, shape, order, stride and content; small, for speed."""
    sides = draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 7, 9]), max_size=4))
    # Most often of a picture's shape, or hardly any would be one.
    if draw(st.integers(0, 3)):
        sides = [max(1, side) for side in (*sides, 5, 6)[:2]]
        sides += draw(st.sampled_from([[], [1], [3], [4]]))
    dtypes = INTEGER_DTYPES + FLOAT_DTYPES
    dtype = np.dtype(
        draw(st.sampled_from(dtypes + REFUSED_DTYPES if draw(st.booleans()) else dtypes))
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    if dtype.kind in "ui" and dtype.itemsize <= 2:
        limits = np.iinfo(dtype)
        array = rng.integers(limits.min, limits.max + 1, sides).astype(dtype)
    elif dtype.kind in "fFD":
        array = rng.random(sides).astype(dtype)
    else:
        array = np.zeros(sides, dtype)
    if dtype.kind == "f" and array.size and draw(st.booleans()):
        odd = [0.0, 1.0, -0.0, math.nan, math.inf, -math.inf, 255.0, -0.1, 1.1, 6e4]
        array.flat[draw(st.integers(0, array.size - 1))] = draw(st.sampled_from(odd))
    layout = draw(st.sampled_from(["C", "F", "negative", "strided", "repeated", "read-only"]))
    if layout == "F":
        array = np.asfortranarray(array)
    elif layout == "negative":
        array = array[tuple(slice(None, None, -1) for _ in array.shape)]
    elif layout == "strided" and array.ndim:
        array = np.repeat(array, 2, axis=0)[::2]
    elif layout == "repeated" and array.ndim and array.shape[0]:
        array = np.broadcast_to(array[:1], array.shape)
    elif layout == "read-only":
        array.setflags(write=False)
    return array


def is_picture(array: np.ndarray) -> bool:
    """Tell whether the documentation says that an array is an image."""
    if 0 in array.shape or array.dtype not in map(np.dtype, INTEGER_DTYPES + FLOAT_DTYPES):
        return False
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (1, 3, 4)):
        return False
    return array.dtype.kind == "u" or bool(((array >= 0) & (array <= 1)).all())


def test_arrays_of_any_kind(pipe, num_cases):
    found = []

    @search(num_cases(ARRAYS_SHARE), arrays())
    def check(array):
        before = array.copy()
        found.append(is_picture(array))
        if not found[-1]:
            refused(pipe, array, process_size=0)
            return
        result = pipe(array, process_size=0)
        assert result.dtype == array.dtype
        assert result.shape == (4 * array.shape[0], 4 * array.shape[1], *array.shape[2:])
        np.testing.assert_array_equal(array, before)

    assert 0.2 < sum(found) / len(found) < 0.8


@st.composite
def pil_images(draw) -> Image.Image:
    """Draw a PIL image of any mode, with metadata that nobody vouches for."""
    mode = draw(st.sampled_from(MODES))
    size = draw(st.sampled_from([(1, 1), (7, 5), (1, 9), (12, 1), (0, 4), (3, 0)]))
    image = Image.new(mode, size)
    descriptor = ImageMode.getmode(mode)
    num_bytes = max(1, int(descriptor.typestr[-1])) * len(descriptor.bands)
    data = np.random.default_rng(draw(st.integers(0, 2**32)))
    if mode == "F":
        values = data.random(size[0] * size[1], np.float32) * draw(st.sampled_from([255, 300, -1]))
        image = Image.frombytes("F", size, values.tobytes()) if 0 not in size else image
    elif mode == "I":
        values = data.integers(0, draw(st.sampled_from([65536, 70000])), size[::-1], np.int32)
        image = Image.fromarray(values) if 0 not in size else image
    elif mode not in ("1", "RGBX", "P", "PA") and 0 not in size:
        image = Image.frombytes(mode, size, data.bytes(num_bytes * size[0] * size[1]))
    elif mode in ("P", "PA"):
        # Often of fewer colours than the pixels name.
        image.putpalette(data.bytes(3 * draw(st.sampled_from([1, 2, 256]))))
        if 0 not in size:
            image.putpixel((0, 0), draw(st.integers(0, 255)))
    image.info = draw(INFO)
    return image


def test_pil_images_of_any_mode(pipe, num_cases):
    upscaled = set()

    @search(num_cases(PIL_SHARE), pil_images())
    def check(image):
        size, info = image.size, dict(image.info)
        extrema = image.getextrema() if image.mode in "IF" and 0 not in size else (0, 0)
        white = {"I": 65535, "F": 255}.get(image.mode, math.inf)
        if 0 in size or extrema[0] < 0 or extrema[1] > white * (1 + 1e-6):
            refused(pipe, image, process_size=0)
            return
        result = pipe(image, process_size=0)
        assert result.size in [(4 * size[0], 4 * size[1]), (4 * size[1], 4 * size[0])]
        assert image.size == size
        assert image.info == info
        upscaled.add(image.mode)

    assert len(upscaled) > len(MODES) / 2


def test_sizes_around_the_edges_of_tiles(pipe, num_cases):
    @search(
        num_cases(SIZES_SHARE),
        SIZES | EXTREMES,
        st.sampled_from(SPECS),
        st.sampled_from([1, 1, 1.3]),
        st.sampled_from([0, 0, 0, 64]),
    )
    def check(size, tiling, scale, process_size):
        width, height = size
        column = np.arange(height, dtype=np.uint8)[:, None, None]
        array = np.broadcast_to(column, (height, width, 3))
        options = {"scale": scale, "process_size": process_size}
        result = pipe(array, tiling=tiling, **options)
        assert result.shape == (round(scale * height), round(scale * width), 3)
        is_exact = tiling not in (None, "auto") and tiling.attention_px in (0, None)
        if is_exact and height * width < 130 * 130:
            whole = pipe(array, tiling=None, **options)
            # A value on the edge between two integers may fall either way.
            assert np.abs(result.astype(int) - whole).max() <= 1
