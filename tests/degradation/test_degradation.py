import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tadsr.degradation import (
    PRESETS,
    DegradationParams,
    apply_degradation,
    sample_degradation,
)
from tadsr.degradation.apply import make_kernel
from tadsr.degradation.jpeg import compress_jpeg
from tadsr.degradation.presets import KERNEL_KINDS, BlurConfig, StageConfig
from tadsr.degradation.sample import KernelParams, NoiseParams

PRESET_NAMES = st.sampled_from(sorted(PRESETS))
SEEDS = st.integers(0, 2**32)


def draw(seed, preset="realesrgan", scale=4):
    return sample_degradation(np.random.default_rng(seed), PRESETS[preset], scale=scale)


def image(height=40, width=52, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, height, width, generator=generator) * 2 - 1


@given(SEEDS, PRESET_NAMES)
def test_parameters_survive_json_and_repeat_with_the_seed(seed, preset):
    params = draw(seed, preset)
    assert params == draw(seed, preset)
    assert DegradationParams.from_dict(json.loads(json.dumps(params.to_dict()))) == params


@given(SEEDS)
def test_parameters_stay_in_the_presets_ranges(seed):
    params = draw(seed)
    for stage, config in zip(params.stages, PRESETS["realesrgan"].stages, strict=True):
        low, high = config.resize_factor
        assert low <= stage.resize_factor <= high
        assert 30 <= stage.jpeg_quality <= 95
        noise = config.gaussian_sigma if stage.noise.kind == "gaussian" else config.poisson_scale
        assert noise[0] <= stage.noise.strength <= noise[1]
        if stage.blur is not None:
            assert stage.blur.size in range(7, 22, 2)
            if stage.blur.kind != "sinc":
                assert config.blur.sigma_px[0] <= stage.blur.sigma_x <= config.blur.sigma_px[1]


def test_frequencies_are_those_of_the_preset():
    drawn = [draw(seed) for seed in range(2000)]
    first = [p.stages[0] for p in drawn]
    second = [p.stages[1] for p in drawn]
    assert all(s.blur is not None for s in first)

    def share(items):
        return np.mean(list(items))

    assert share(s.blur is not None for s in second) == pytest.approx(0.8, abs=0.04)
    assert share(s.resize_factor < 1 for s in first) == pytest.approx(0.7, abs=0.04)
    assert share(s.resize_factor > 1 for s in second) == pytest.approx(0.3, abs=0.04)
    assert share(s.noise.kind == "gaussian" for s in first) == pytest.approx(0.5, abs=0.04)
    assert share(s.noise.is_gray for s in first) == pytest.approx(0.4, abs=0.04)
    assert share(p.final_sinc is not None for p in drawn) == pytest.approx(0.8, abs=0.04)
    assert share(p.jpeg_before_resize for p in drawn) == pytest.approx(0.5, abs=0.04)
    assert share(s.blur.kind == "sinc" for s in first) == pytest.approx(0.1, abs=0.03)
    kinds = [s.blur.kind for s in first if s.blur.kind != "sinc"]
    weights = PRESETS["realesrgan"].stages[0].blur.kind_weights
    for kind, weight in zip(KERNEL_KINDS, weights, strict=True):
        assert share(k == kind for k in kinds) == pytest.approx(weight, abs=0.04)


@settings(max_examples=30, deadline=None)
@given(SEEDS, PRESET_NAMES, st.integers(4, 60), st.integers(4, 60), st.integers(1, 4))
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


def test_each_part_of_a_degradation_changes_the_picture():
    hq, params = image(64, 64), draw(5)
    noise = NoiseParams("gaussian", strength=20.0, is_gray=False, seed=0)
    stage = dataclasses.replace(params.stages[0], noise=noise, resize_factor=1.0)
    params = dataclasses.replace(params, stages=(stage, params.stages[1]))
    base = apply_degradation(hq, params)
    changes = {
        "blur": dataclasses.replace(stage, blur=KernelParams("iso", 21, 3.0, 3.0)),
        "noise": dataclasses.replace(stage, noise=dataclasses.replace(noise, seed=1)),
        "jpeg": dataclasses.replace(stage, jpeg_quality=5),
        "resize": dataclasses.replace(stage, resize_factor=0.2),
    }
    for changed in changes.values():
        other = dataclasses.replace(params, stages=(changed, params.stages[1]))
        assert not apply_degradation(hq, other).equal(base)


def test_jpeg_is_pillows_own():
    pixels = np.random.default_rng(0).integers(0, 256, (17, 23, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=40)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    got = (compress_jpeg(tensor, 40.2) * 255).round().byte().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(got, np.asarray(Image.open(buffer)))


def test_every_kind_of_kernel_is_built():
    for kind in (*KERNEL_KINDS, "sinc"):
        kernel = make_kernel(KernelParams(kind, 9, 1.5, 0.7, 0.3, 1.4, 2.0))
        assert kernel.shape == (9, 9)
        assert kernel.sum().item() == pytest.approx(1, abs=1e-5)


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probability": 1.2}, "probability"),
        ({"size_px": (8, 21)}, "odd"),
        ({"kind_weights": (1.0,)}, "6 weights"),
        ({"kind_weights": (0.5,) * 6}, "sum to 1"),
        ({"sigma_px": (3.0, 0.2)}, "ordered and in"),
    ],
)
def test_blurs_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        BlurConfig(**change)


def test_stages_out_of_range_are_refused():
    stage = PRESETS["realesrgan"].stages[0]
    assert isinstance(stage, StageConfig)
    with pytest.raises(ValueError, match="enclose 1"):
        dataclasses.replace(stage, resize_factor=(1.2, 1.5))
    with pytest.raises(ValueError, match="summing to 1"):
        dataclasses.replace(stage, resize_weights=(1, 1, 1))
    with pytest.raises(ValueError, match="scale must be at least 1"):
        draw(0, scale=0)
