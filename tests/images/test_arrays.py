import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from tadsr.images import decode_image, encode_image, pad_reflect, resize_bicubic

from .samples import round_trip

BAD_FLOATS = [np.nan, np.inf, -np.inf, -0.01, 1.01, 255.0]
ARRAY_SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, max_side=6).flatmap(
    lambda sides: st.sampled_from([sides, (*sides, 1), (*sides, 3), (*sides, 4)])
)


@settings(deadline=None, max_examples=60)
@given(hnp.arrays(st.sampled_from([np.uint8, np.uint16, ">u2"]), ARRAY_SHAPES))
def test_integer_arrays_round_trip_exactly(array):
    if array.ndim == 3 and array.shape[2] == 4:
        array[..., 3] = array[..., 3].clip(1)  # under alpha 0 nothing is kept
    result = round_trip(array)
    assert result.dtype == array.dtype
    assert result.shape == array.shape
    np.testing.assert_array_equal(result, array)


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 1), (1, 6, 3), (3, 2, 4)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_float_arrays_round_trip(dtype, shape):
    array = np.random.default_rng(0).random(shape).astype(dtype)
    result = round_trip(array)
    assert result.dtype == dtype
    assert result.shape == shape
    np.testing.assert_allclose(result, array, atol=1e-6 if dtype != np.float16 else 1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_round_trip(dtype):
    tensor = torch.rand(3, 4, 5).to(dtype).requires_grad_()
    decoded = decode_image(tensor)
    assert decoded.rgb.dtype == torch.float32
    assert not decoded.rgb.requires_grad
    result = round_trip(tensor)
    assert result.dtype == dtype
    assert result.device == tensor.device
    torch.testing.assert_close(result, tensor.detach(), atol=1e-6, rtol=0)


def test_views_and_read_only_arrays():
    array = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    array.flags.writeable = False
    np.testing.assert_array_equal(round_trip(array[::-2, 1::3]), array[::-2, 1::3])


def test_all_16_bit_values_survive():
    array = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    np.testing.assert_array_equal(round_trip(array), array)


def test_rounding_slack_is_clamped():
    decoded = decode_image(np.array([[1.0 + 5e-7, -5e-7]], np.float64))
    assert decoded.rgb.min() == 0
    assert decoded.rgb.max() == 1


@pytest.mark.parametrize(
    ("image", "shape", "dtype"),
    [
        (Image.new("L", (7, 5)), (5, 7, 3), np.uint8),
        (Image.new("LA", (7, 5)), (5, 7, 4), np.uint8),
        (Image.new("I;16", (7, 5)), (5, 7, 3), np.uint16),
        (Image.new("F", (7, 5)), (5, 7, 3), np.uint8),
        (np.zeros((5, 7), np.uint16), (5, 7, 3), np.uint16),
        (np.zeros((5, 7, 4)), (5, 7, 4), np.uint8),
        (torch.zeros(3, 5, 7), (5, 7, 3), np.uint8),
    ],
)
def test_output_types(image, shape, dtype):
    array = round_trip(image, "np")
    assert array.shape == shape
    assert array.dtype == dtype
    tensor = round_trip(image, "pt")
    assert tensor.shape == (3, 5, 7)
    assert tensor.dtype == torch.float32
    is_gray = getattr(image, "mode", "RGB") in ("L", "LA", "I;16", "F") or image.ndim == 2
    mode = ("L" if is_gray else "RGB") + ("A" if shape[2] == 4 else "")
    assert round_trip(image, "pil").mode == mode


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ([Image.new("L", (1, 1))], TypeError, "one at a time"),
        ("photo.png", TypeError, "read_image"),
        (None, TypeError, "NoneType"),
        (np.zeros((4, 4), np.int64), TypeError, "int64"),
        (np.zeros((4, 4), bool), TypeError, "bool"),
        (np.zeros((4, 4), complex), TypeError, "complex128"),
        (np.zeros((3, 4, 5), np.uint8), ValueError, r"\(3, 4, 5\)"),
        (np.zeros((4, 4, 2), np.uint8), ValueError, r"\(4, 4, 2\)"),
        (np.zeros((1, 4, 4, 3), np.uint8), ValueError, "shape"),
        (np.zeros((0, 4), np.uint8), ValueError, "no side 0"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), TypeError, "divide"),
        (torch.zeros(2, 3, 4, 4), ValueError, "one image at a time"),
        (torch.zeros(1, 4, 4), ValueError, r"\(1, 4, 4\)"),
        (torch.zeros(3, 0, 4), ValueError, "no side 0"),
        *((np.full((2, 2), value), ValueError, "rescale|finite") for value in BAD_FLOATS),
        *((torch.full((3, 2, 2), value), ValueError, "rescale|finite") for value in BAD_FLOATS),
        (np.full((2, 2), 1e300), ValueError, "finite"),
        (Image.new("RGB", (0, 4)), ValueError, "0×4"),
        (Image.new("I", (1, 1), 65536), ValueError, "65536"),
        (Image.new("I", (1, 1), -1), ValueError, "-1"),
        (Image.new("F", (1, 1), 300.0), ValueError, "300"),
    ],
)
def test_refused_images(image, error, message):
    with pytest.raises(error, match=message):
        decode_image(image)


@pytest.mark.parametrize(
    ("rgb", "alpha", "output_type", "error", "message"),
    [
        (torch.zeros(3, 2, 2), None, "jpg", ValueError, "'pil', 'np', 'pt'"),
        (torch.zeros(1, 3, 2, 2), None, None, ValueError, r"\(3, H, W\)"),
        (torch.zeros(3, 2, 2), torch.zeros(1, 2, 3), None, ValueError, "height and width"),
        (torch.zeros(3, 2, 2), torch.zeros(2, 2), None, ValueError, r"\(1, H, W\)"),
        (torch.full((3, 2, 2), torch.nan), None, None, ValueError, "NaN"),
        (torch.zeros(3, 2, 2).int(), None, None, TypeError, "int32"),
        (np.zeros((3, 2, 2)), None, None, TypeError, "ndarray"),
    ],
)
def test_refused_results(rgb, alpha, output_type, error, message):
    with pytest.raises(error, match=message):
        encode_image(rgb, alpha, decode_image(Image.new("RGB", (1, 1))), output_type)


# --- resizing and padding ---


@given(st.tuples(*[st.integers(1, 30)] * 2), st.tuples(*[st.integers(1, 60)] * 2))
@example((5, 1), (10, 1))
@example((8, 7), (29, 1))
@example((30, 21), (54, 29))
@example((24, 3), (42, 4))
@example((5000, 2), (6500, 3))
@example((2, 6500), (3, 5000))
@example((2100, 2100), (40, 30))
def test_resize_agrees_with_pillow(old, size):
    plane = np.random.default_rng(0).random(old, dtype=np.float32)
    expected = Image.fromarray(plane).resize(size[::-1], Image.Resampling.BICUBIC)
    result = resize_bicubic(torch.from_numpy(plane)[None, None], size)
    # Positions in float32 make up to 3e-6 at these sizes; a level of 8 bits is 4e-3.
    np.testing.assert_allclose(result[0, 0].numpy(), np.asarray(expected), atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(*[st.integers(1, 12)] * 4)
def test_resize_keeps_constants(height, width, new_height, new_width):
    x = torch.full((1, 2, height, width), 0.3)
    result = resize_bicubic(x, (new_height, new_width))
    torch.testing.assert_close(result, torch.full((1, 2, new_height, new_width), 0.3))


def test_resize_keeps_dtype_and_identity():
    x = torch.rand(1, 3, 4, 5, dtype=torch.float16)
    assert resize_bicubic(x, (8, 9)).dtype == torch.float16
    assert resize_bicubic(x, (4, 5)) is x


@settings(deadline=None, max_examples=100)
@given(*[st.integers(1, 6)] * 2, *[st.integers(0, 25)] * 2)
def test_pad_reflect_agrees_with_numpy(height, width, bottom, right):
    x = np.arange(2 * height * width, dtype=np.float32).reshape(1, 2, height, width)
    expected = np.pad(x, ((0, 0), (0, 0), (0, bottom), (0, right)), mode="reflect")
    np.testing.assert_array_equal(pad_reflect(torch.from_numpy(x), bottom, right), expected)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda x: resize_bicubic(x, (0, 4)), ValueError),
        (lambda x: resize_bicubic(x[0], (4, 4)), ValueError),
        (lambda x: resize_bicubic(x.int(), (4, 4)), TypeError),
        (lambda x: pad_reflect(x, -1, 0), ValueError),
        (lambda x: pad_reflect(x[0], 1, 1), ValueError),
        (lambda x: pad_reflect(None, 1, 1), TypeError),
    ],
)
def test_wrong_tensor_arguments(call, error):
    with pytest.raises(error):
        call(torch.zeros(1, 3, 4, 4))
