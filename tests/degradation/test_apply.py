import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tadsr.degradation import (
    PRESETS,
    DegradationParams,
    apply_degradation,
    sample_degradation,
)
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


@pytest.mark.parametrize("size", [7, FFT_FROM_PX - 2, FFT_FROM_PX, 15, 21])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (37, 53), (22, 11), (3, 5), (1, 1)])
def test_blur_is_a_correlation_with_the_kernel_at_any_size(size, height, width):
    image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    params = KernelParams("aniso", size, 2.0, 0.7, 0.5)
    half = size // 2
    mode = "reflect" if min(height, width) > half else "replicate"
    padded = F.pad(image.double(), (half,) * 4, mode=mode)
    kernel = make_kernel(params).double()
    expect = F.conv2d(padded, kernel.expand(3, 1, -1, -1), groups=3)
    torch.testing.assert_close(_blur(image, params).double(), expect, atol=BLUR_ATOL, rtol=0)


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


def test_gray_noise_is_the_same_in_all_channels():
    image = torch.full((1, 3, 32, 32), 0.5)
    for kind, strength in (("gaussian", 10.0), ("poisson", 1.0)):
        noisy = _add_noise(image, NoiseParams(kind, strength, is_gray=True, seed=3)) - image
        assert noisy.std() > 0
        assert noisy[:, 0].equal(noisy[:, 1])
        coloured = _add_noise(image, NoiseParams(kind, strength, is_gray=False, seed=3)) - image
        assert not coloured[:, 0].equal(coloured[:, 1])


def test_gaussian_noise_has_the_given_spread():
    image = torch.full((1, 3, 128, 128), 0.5)
    noise = _add_noise(image, NoiseParams("gaussian", 12.0, is_gray=False, seed=0)) - image
    assert noise.std().item() * 255 == pytest.approx(12, rel=0.03)


def test_poisson_noise_counts_photons_by_the_levels_in_use():
    # 16 levels in use: a value v is a count of mean 16·v, so its variance is v / 16.
    image = (torch.arange(16) / 15 * 0.2 + 0.3).repeat(1, 3, 128, 8)
    noise = _add_noise(image, NoiseParams("poisson", 0.5, is_gray=False, seed=0)) - image
    expect = 0.25 * image.mean().item() / 16
    assert noise.var().item() == pytest.approx(expect, rel=0.05)


def test_the_global_generators_are_neither_used_nor_moved():
    hq = torch.zeros(1, 3, 32, 32)
    params = sample_degradation(np.random.default_rng(3), PRESETS["realesrgan"])
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = apply_degradation(hq, params)
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(1)
    assert apply_degradation(hq, params).equal(first)


def test_the_input_is_left_alone_and_its_dtype_kept():
    hq = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32).half()
    before = hq.clone()
    params = sample_degradation(np.random.default_rng(0), PRESETS["realesrgan"])
    assert apply_degradation(hq, params).dtype == torch.float16
    assert hq.equal(before)


def test_the_web_preset_compresses_by_both_codecs():
    records = [sample_degradation(np.random.default_rng(i), PRESETS["web"]) for i in range(60)]
    codecs = [stage.codec for record in records for stage in record.stages]
    assert 0.12 < codecs.count("webp") / len(codecs) < 0.4
    record = next(r for r in records if r.stages[1].codec == "webp" and not r.jpeg_before_resize)
    hq = torch.rand(1, 3, 64, 72, generator=torch.Generator().manual_seed(0)) * 2 - 1
    as_webp = apply_degradation(hq, record)
    last = dataclasses.replace(record.stages[1], codec="jpeg")
    as_jpeg = apply_degradation(hq, dataclasses.replace(record, stages=(record.stages[0], last)))
    assert as_webp.shape == (1, 3, 16, 18)
    assert 0.005 < (as_webp - as_jpeg).abs().mean() < 0.2
    assert DegradationParams.from_dict(json.loads(json.dumps(record.to_dict()))) == record
