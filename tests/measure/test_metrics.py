import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tadsr.errors import TADSRError
from tadsr.measure.metrics import (
    OWN_METRICS,
    Metric,
    default_metrics,
    detail,
    luma,
    make_metric,
    psnr,
    ssim,
)

CHANNELS = pytest.mark.parametrize("channel", ["y", "rgb"])


def picture(seed: int = 0, size: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size + 3, 3), np.uint8)


def test_luma_spans_the_studio_range():
    black_white = np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8)
    np.testing.assert_allclose(luma(black_white), [[16, 235]], atol=0.01)


@given(shift=st.integers(1, 100))
def test_psnr_of_a_constant_shift_follows_its_formula(shift):
    dark = np.full((8, 9, 3), 50, np.uint8)
    bright = dark + np.uint8(shift)
    assert psnr(bright, dark, channel="rgb") == pytest.approx(20 * math.log10(255 / shift))
    luma_shift = shift * 219 / 255
    assert psnr(bright, dark) == pytest.approx(20 * math.log10(255 / luma_shift), abs=1e-3)


@CHANNELS
def test_equal_images_have_infinite_psnr_and_full_ssim(channel):
    image = picture()
    assert psnr(image, image, channel=channel) == math.inf
    assert ssim(image, image, channel=channel) == pytest.approx(1)


@CHANNELS
@given(seeds=st.tuples(st.integers(0, 99), st.integers(100, 199)))
def test_psnr_and_ssim_are_symmetric(channel, seeds):
    a, b = map(picture, seeds)
    assert psnr(a, b, channel=channel) == pytest.approx(psnr(b, a, channel=channel))
    assert ssim(a, b, channel=channel) == pytest.approx(ssim(b, a, channel=channel))


@CHANNELS
@pytest.mark.parametrize("metric", [psnr, ssim])
def test_the_more_noise_the_worse(metric, channel):
    image = np.full((24, 24, 3), 128.0)
    noise = np.random.default_rng(0).standard_normal(image.shape)
    noisy = [(image + k * noise).clip(0, 255).astype(np.uint8) for k in (2, 8, 20)]
    values = [metric(x, image.astype(np.uint8), channel=channel) for x in noisy]
    assert values[0] > values[1] > values[2]


@given(border_px=st.integers(0, 5))
def test_nothing_in_the_border_is_measured(border_px):
    image = picture()
    spoiled = image.copy()
    inner = (slice(border_px, 24 - border_px), slice(border_px, 27 - border_px))
    spoiled[...] = 255 - spoiled
    spoiled[inner] = image[inner]
    assert psnr(spoiled, image, border_px=border_px) == math.inf
    assert ssim(spoiled, image, border_px=border_px) == pytest.approx(1)
    assert detail(spoiled, border_px=border_px) == detail(image, border_px=border_px)


def test_detail_is_zero_on_ramps_and_rises_with_structure():
    ramp = np.tile(np.arange(0, 240, 10, np.uint8)[None, :, None], (24, 1, 3))
    assert detail(ramp) == pytest.approx(0, abs=1e-9)
    smooth = picture().astype(np.float64)
    smooth = ((smooth + np.roll(smooth, 1, 0) + np.roll(smooth, 1, 1)) / 3).astype(np.uint8)
    assert detail(picture()) > detail(smooth) > 0


def test_detail_of_one_bright_pixel_is_counted_by_hand():
    image = np.zeros((5, 5, 3), np.uint8)
    image[2, 2] = 255
    # Of 9 inner pixels the centre has 4 × 219, its 4 neighbours 219 each.
    assert detail(image) == pytest.approx(219 * 8 / 9, abs=0.01)


@pytest.mark.parametrize(
    ("image", "reference", "options", "error", "message"),
    [
        (picture(), picture(size=25), {}, ValueError, r"27×24 px and 28×25 px"),
        (picture() / 255, picture(), {}, TypeError, "uint8 array, got float64"),
        ([1], picture(), {}, TypeError, "uint8 array, got list"),
        (picture()[..., 0], picture(), {}, ValueError, r"\(H, W, 3\)"),
        (picture(), picture(), {"channel": "hsv"}, ValueError, "'y' or 'rgb', got 'hsv'"),
        (picture(), picture(), {"border_px": 12}, ValueError, "smaller border"),
        (picture(), picture(), {"border_px": -1}, ValueError, "at least 0 px, got -1"),
        (picture(), picture(), {"border_px": 1.5}, TypeError, "whole number of px"),
    ],
)
def test_wrong_arguments_are_explained(image, reference, options, error, message):
    for metric in (psnr, ssim):
        with pytest.raises(error, match=message):
            metric(image, reference, **options)


def test_ssim_needs_its_window():
    with pytest.raises(ValueError, match="must have 11 px a side inside a border of 7 px"):
        ssim(picture(), picture(), border_px=7)


def test_metrics_by_name_are_the_functions():
    a, b = picture(0), picture(1)
    metrics = {name: make_metric(name, border_px=2) for name in OWN_METRICS}
    found = {name: metric.measure(a, b) for name, metric in metrics.items()}
    assert found == {
        "psnr_y": psnr(a, b, border_px=2),
        "ssim_y": ssim(a, b, border_px=2),
        "psnr_rgb": psnr(a, b, channel="rgb", border_px=2),
        "ssim_rgb": ssim(a, b, channel="rgb", border_px=2),
        "detail": detail(a, border_px=2),
    }
    assert [name for name, metric in metrics.items() if not metric.needs_reference] == ["detail"]
    assert default_metrics(True) == OWN_METRICS
    assert default_metrics(False) == ("detail",)


def test_better_follows_the_direction():
    def compare(is_higher_better):
        metric = Metric("m", lambda *_: 0.0, False, is_higher_better)
        return metric.is_better(2, 1), metric.is_better(1, 2), metric.is_better(1, 1)

    assert compare(True) == (True, False, False)
    assert compare(False) == (False, True, False)
    assert compare(None) == (False, False, False)


def test_a_metric_of_pyiqa_without_pyiqa_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    with pytest.raises(TADSRError, match=r"got 'musiq', and pyiqa does not import .*pip install"):
        make_metric("musiq")
    with pytest.raises(TADSRError, match="did you mean 'psnr_y'"):
        make_metric("psnr_yy")


def test_missing_scikit_image_is_named_before_anything_is_measured(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    with pytest.raises(TADSRError, match=r"pip install 'tadsr\[eval\]'"):
        make_metric("ssim_y")
    assert make_metric("detail").measure(picture(), None) > 0


class FakeNetwork:
    """What pyiqa documents of a metric: a call on (N, 3, H, W) in [0, 1], and its traits."""

    def __init__(self, mode: str) -> None:
        self.metric_mode, self.lower_better = mode, mode == "FR"

    def __call__(self, image, reference=None):
        assert image.shape == (1, 3, 24, 27)
        assert 0.9 < image.max() <= 1
        assert (reference is not None) == (self.metric_mode == "FR")
        return (image if reference is None else (image - reference).abs()).mean((1, 2, 3))


@pytest.fixture
def pyiqa(monkeypatch):
    modes = {"lpips": "FR", "musiq": "NR"}

    def create_metric(name, device):
        assert device == torch.device("cpu")
        return FakeNetwork(modes[name])

    library = SimpleNamespace(list_models=lambda: sorted(modes), create_metric=create_metric)
    monkeypatch.setitem(sys.modules, "pyiqa", library)


@pytest.mark.usefixtures("pyiqa")
def test_a_metric_of_pyiqa_takes_its_traits_and_range():
    a, b = picture(0), picture(1)
    lpips, musiq = make_metric("lpips"), make_metric("musiq")
    assert (lpips.needs_reference, lpips.is_higher_better) == (True, False)
    assert (musiq.needs_reference, musiq.is_higher_better) == (False, True)
    difference = np.abs(a.astype(float) - b).mean() / 255
    assert lpips.measure(a, b) == pytest.approx(difference, rel=1e-5)
    assert musiq.measure(a, b) == pytest.approx(a.mean() / 255, rel=1e-5)


@pytest.mark.usefixtures("pyiqa")
def test_a_name_that_pyiqa_does_not_know_is_a_wrong_argument():
    with pytest.raises(ValueError, match="did you mean musiq"):
        make_metric("musik")
