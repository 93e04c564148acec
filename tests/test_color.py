from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tadsr.color import COLOR_FIXES, adain_color_fix, no_color_fix, wavelet_color_fix

GOLDEN = load_file(Path(__file__).parent / "data" / "color.safetensors")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
FIXES = ["adain", "wavelet"]


def _random_pair(height, width, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, batch, 3, height, width, generator=generator).unbind()


@pytest.mark.parametrize("name", FIXES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_agrees_with_published_code(name, dtype):
    image, reference = GOLDEN["color.target"].to(dtype), GOLDEN["color.source"].to(dtype)
    fixed = COLOR_FIXES[name](image, reference)
    assert fixed.dtype == dtype
    error = (fixed.float() - GOLDEN[f"color.{name}"]).abs().max().item()
    assert error <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", FIXES)
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (1, 7), (5, 3), (33, 2)])
def test_tiny_images_stay_finite(name, size):
    # (1, 1) has no unbiased variance, and 2^4 px exceed every side here but one
    fixed = COLOR_FIXES[name](*_random_pair(*size))
    assert fixed.isfinite().all()


@pytest.mark.parametrize("name", FIXES)
def test_single_pixel_takes_the_reference_color(name):
    image, reference = _random_pair(1, 1)
    torch.testing.assert_close(COLOR_FIXES[name](image, reference), reference)


def test_adain_gives_the_statistics_of_the_reference():
    image, reference = _random_pair(40, 30, batch=2)
    fixed = adain_color_fix(image, reference * 0.3 + 0.1)
    for statistic in (torch.mean, torch.std):
        expected = statistic(reference * 0.3 + 0.1, dim=(-2, -1))
        torch.testing.assert_close(statistic(fixed, dim=(-2, -1)), expected, atol=1e-3, rtol=0)


def test_adain_survives_a_constant_image():
    _, reference = _random_pair(8, 8)
    fixed = adain_color_fix(torch.full((1, 3, 8, 8), 0.5), reference)
    expected = reference.mean(dim=(-2, -1), keepdim=True).expand_as(fixed)
    torch.testing.assert_close(fixed, expected)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 99), st.floats(-0.5, 0.5))
def test_wavelet_moves_a_color_cast_whole(height, width, seed, cast):
    image, _ = _random_pair(height, width, seed=seed)
    fixed = wavelet_color_fix(image, image + cast)
    torch.testing.assert_close(fixed, image + cast, atol=1e-5, rtol=0)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(FIXES), st.integers(1, 20), st.integers(1, 20), st.integers(0, 99))
def test_image_as_its_own_reference_is_unchanged(name, height, width, seed):
    image, _ = _random_pair(height, width, seed=seed)
    torch.testing.assert_close(COLOR_FIXES[name](image, image), image, atol=1e-5, rtol=0)


@pytest.mark.parametrize("levels", [1, 3, 7])
def test_wavelet_is_the_sum_of_dilated_binomial_blurs(levels):
    image, reference = _random_pair(11, 17)
    kernel = torch.tensor([1.0, 2.0, 1.0]).outer(torch.tensor([1.0, 2.0, 1.0])) / 16

    def low_band(x):
        for level in range(levels):
            padded = torch.nn.functional.pad(x, [2**level] * 4, mode="replicate")
            weight = kernel.expand(3, 1, 3, 3)
            x = torch.nn.functional.conv2d(padded, weight, dilation=2**level, groups=3)
        return x

    expected = image - low_band(image) + low_band(reference)
    torch.testing.assert_close(wavelet_color_fix(image, reference, levels), expected)


def test_arguments_are_not_changed():
    image, reference = _random_pair(6, 6)
    before = image.clone(), reference.clone()
    for fix in COLOR_FIXES.values():
        fix(image, reference)
    assert torch.equal(image, before[0])
    assert torch.equal(reference, before[1])


def test_names():
    assert list(COLOR_FIXES) == ["adain", "wavelet", "none"]
    image, reference = _random_pair(2, 2)
    assert COLOR_FIXES["none"] is no_color_fix
    assert no_color_fix(image, reference) is image


@pytest.mark.parametrize("fix", [adain_color_fix, wavelet_color_fix])
@pytest.mark.parametrize(
    ("image", "reference", "error", "message"),
    [
        (torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 5), ValueError, "one shape"),
        (torch.zeros(3, 4, 4), torch.zeros(3, 4, 4), ValueError, "B, 3, H, W"),
        (torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 4, 4), ValueError, "B, 3, H, W"),
        (torch.zeros(1, 3, 0, 4), torch.zeros(1, 3, 0, 4), ValueError, "no side 0"),
        (torch.zeros(1, 3, 4, 4).int(), torch.zeros(1, 3, 4, 4), TypeError, "int32"),
        (torch.zeros(1, 3, 4, 4), None, TypeError, "NoneType"),
    ],
)
def test_wrong_arguments(fix, image, reference, error, message):
    with pytest.raises(error, match=message):
        fix(image, reference)


@pytest.mark.parametrize(("levels", "error"), [(0, ValueError), (2.0, TypeError)])
def test_wrong_levels(levels, error):
    with pytest.raises(error, match="levels"):
        wavelet_color_fix(*_random_pair(4, 4), levels=levels)
