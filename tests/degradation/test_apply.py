"""Degradations as they are drawn, applied to images."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tadsr.degradation import PRESETS, DegradationParams, apply_degradation, sample_degradation
from tadsr.degradation.apply import (
    FFT_FROM_PX,
    _add_noise,
    _blur,
    _correlate_fft,
    _fast_fft_length,
    make_kernel,
)
from tadsr.degradation.sample import KernelParams, NoiseParams

# Against conv2d in float64; values are in [0, 1].
BLUR_ATOL = 2e-6


def draw(seed, preset="realesrgan", scale=4):
    return sample_degradation(np.random.default_rng(seed), PRESETS[preset], scale=scale)


def image(height=40, width=52, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, height, width, generator=generator) * 2 - 1


@pytest.mark.parametrize("size", [7, FFT_FROM_PX - 2, FFT_FROM_PX, 15, 21])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (37, 53), (22, 11), (3, 5), (1, 1)])
def test_blur_is_a_correlation_with_the_kernel_at_any_size(size, height, width):
    picture = image(height, width)
    params = KernelParams("aniso", size, 2.0, 0.7, 0.5)
    half = size // 2
    mode = "reflect" if min(height, width) > half else "replicate"
    padded = F.pad(picture.double(), (half,) * 4, mode=mode)
    kernel = make_kernel(params).double()
    expect = F.conv2d(padded, kernel.expand(3, 1, -1, -1), groups=3)
    torch.testing.assert_close(_blur(picture, params).double(), expect, atol=BLUR_ATOL, rtol=0)


def test_the_fft_does_not_turn_the_kernel():
    generator = torch.Generator().manual_seed(0)
    padded = torch.rand(1, 3, 41, 30, generator=generator)
    kernel = torch.rand(11, 11, generator=generator) / 121  # unlike ours, not symmetric
    expect = F.conv2d(padded, kernel.expand(3, 1, -1, -1), groups=3)
    torch.testing.assert_close(_correlate_fft(padded, kernel), expect, atol=BLUR_ATOL, rtol=0)


@pytest.mark.parametrize("length", [1, 2, 7, 31, 127, 532, 1021])
def test_fft_lengths_are_even_smooth_and_barely_longer(length):
    fast = _fast_fft_length(length)
    rest = fast
    for prime in (2, 3, 5):
        while rest % prime == 0:
            rest //= prime
    assert rest == 1
    assert fast % 2 == 0
    assert length <= fast <= 1.35 * length + 1


@pytest.mark.parametrize(("kind", "strength"), [("gaussian", 10.0), ("poisson", 1.0)])
def test_gray_noise_is_the_same_in_all_channels(kind, strength):
    flat = torch.full((1, 3, 32, 32), 0.5)
    noisy = _add_noise(flat, NoiseParams(kind, strength, is_gray=True, seed=3)) - flat
    assert noisy.std() > 0
    assert noisy[:, 0].equal(noisy[:, 1])
    coloured = _add_noise(flat, NoiseParams(kind, strength, is_gray=False, seed=3)) - flat
    assert not coloured[:, 0].equal(coloured[:, 1])


def test_noise_has_the_given_spread():
    flat = torch.full((1, 3, 128, 128), 0.5)
    noise = _add_noise(flat, NoiseParams("gaussian", 12.0, is_gray=False, seed=0)) - flat
    assert noise.std().item() * 255 == pytest.approx(12, rel=0.03)
    # 16 levels in use: a value v is a count of mean 16·v, so its variance is v / 16.
    levels = (torch.arange(16) / 15 * 0.2 + 0.3).repeat(1, 3, 128, 8)
    noise = _add_noise(levels, NoiseParams("poisson", 0.5, is_gray=False, seed=0)) - levels
    assert noise.var().item() == pytest.approx(0.25 * levels.mean().item() / 16, rel=0.05)


def test_neither_the_global_generators_nor_the_input_are_used_up():
    hq, params = image(32, 32).half(), draw(3)
    before = hq.clone()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = apply_degradation(hq, params)
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(1)
    assert apply_degradation(hq, params).equal(first)
    assert first.dtype == torch.float16
    assert hq.equal(before)


def test_the_web_preset_compresses_by_both_codecs():
    records = [draw(i, "web") for i in range(60)]
    codecs = [stage.codec for record in records for stage in record.stages]
    assert 0.12 < codecs.count("webp") / len(codecs) < 0.4
    record = next(r for r in records if r.stages[1].codec == "webp" and not r.jpeg_before_resize)
    hq = image(64, 72)
    as_webp = apply_degradation(hq, record)
    last = dataclasses.replace(record.stages[1], codec="jpeg")
    as_jpeg = apply_degradation(hq, dataclasses.replace(record, stages=(record.stages[0], last)))
    assert as_webp.shape == (1, 3, 16, 18)
    assert 0.005 < (as_webp - as_jpeg).abs().mean() < 0.2


@settings(max_examples=30)
@given(
    st.integers(0, 2**32), st.sampled_from(sorted(PRESETS)), st.integers(4, 60), st.integers(4, 60),
    st.integers(1, 4),
)  # fmt: skip
def test_any_size_is_degraded_within_range_and_replays(seed, preset, height, width, scale):
    hq, params = image(height, width), draw(seed, preset, scale)
    lq = apply_degradation(hq, params)
    assert lq.shape == (1, 3, height // scale, width // scale)
    assert torch.isfinite(lq).all()
    assert lq.abs().max() <= 1
    levels = (lq / 2 + 0.5) * 255
    torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0)
    again = apply_degradation(hq, DegradationParams.from_dict(params.to_dict()))
    assert again.equal(lq)


def test_a_batch_equals_its_items():
    hq, params = image(batch=3), [draw(s) for s in range(3)]
    together = apply_degradation(hq, params)
    for i in range(3):
        assert together[i : i + 1].equal(apply_degradation(hq[i : i + 1], params[i]))


def test_the_bicubic_preset_is_pillows_reduction():
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    hq = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    lq = apply_degradation(hq, draw(0, "bicubic"))
    got = ((lq[0] / 2 + 0.5) * 255).permute(1, 2, 0).numpy()
    expect = np.asarray(Image.fromarray(pixels).resize((16, 12), Image.Resampling.BICUBIC), float)
    assert np.abs(got - expect).max() <= 1.01


NOISE = NoiseParams("gaussian", strength=20.0, is_gray=False, seed=0)


@pytest.mark.parametrize(
    "change",
    [
        {"blur": KernelParams("iso", 21, 3.0, 3.0)},
        {"noise": dataclasses.replace(NOISE, seed=1)},
        {"jpeg_quality": 5},
        {"resize_factor": 0.2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_part_of_a_degradation_changes_the_picture(change):
    hq, params = image(64, 64), draw(5)
    stage = dataclasses.replace(params.stages[0], noise=NOISE, resize_factor=1.0)
    base, other = (
        dataclasses.replace(params, stages=(first, params.stages[1]))
        for first in (stage, dataclasses.replace(stage, **change))
    )
    assert not apply_degradation(hq, other).equal(apply_degradation(hq, base))


@pytest.mark.parametrize(
    ("hq", "params", "message"),
    [
        (torch.zeros(3, 8, 8), draw(0), "shape"),
        (torch.zeros(2, 3, 8, 8), [draw(0)], "one per image"),
        (torch.zeros(2, 3, 8, 8), [draw(0), draw(0, scale=2)], "one scale"),
        (torch.zeros(1, 3, 3, 8), draw(0), "at least scale"),
    ],
)
def test_images_that_do_not_fit_are_refused(hq, params, message):
    with pytest.raises(ValueError, match=message):
        apply_degradation(hq, params)
