"""What is drawn: in its ranges, as often as its probabilities say, and kept as JSON."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tadsr.degradation import PRESETS, DegradationConfig, DegradationParams, sample_degradation
from tadsr.degradation.presets import KERNEL_KINDS
from tadsr.degradation.sample import SMALL_SINC_PX

PRESET = PRESETS["realesrgan"]
SEEDS = st.integers(0, 2**32)


def draw(seed, config=PRESET, scale=4):
    return sample_degradation(np.random.default_rng(seed), config, scale=scale)


def as_json(params):
    return DegradationParams.from_dict(json.loads(json.dumps(params.to_dict())))


@given(SEEDS, st.sampled_from(sorted(PRESETS)))
def test_parameters_stay_in_their_ranges_and_survive_json(seed, name):
    params, preset = draw(seed, PRESETS[name]), PRESETS[name]
    assert params == draw(seed, preset) == as_json(params)
    if params.final_sinc is not None:
        assert params.final_sinc.size in range(7, 22, 2)
        assert math.pi / 3 <= params.final_sinc.cutoff <= math.pi
    for stage, config in zip(params.stages, preset.stages, strict=True):
        low, high = config.resize_factor
        assert low <= stage.resize_factor <= high
        assert config.jpeg_quality[0] <= stage.jpeg_quality <= config.jpeg_quality[1]
        noise = config.gaussian_sigma if stage.noise.kind == "gaussian" else config.poisson_scale
        assert noise[0] <= stage.noise.strength <= noise[1]
        if (blur := stage.blur) is None:
            continue
        assert blur.size in range(7, 22, 2)
        if blur.kind == "sinc":
            assert math.pi / (3 if blur.size < SMALL_SINC_PX else 5) <= blur.cutoff <= math.pi
            continue
        assert config.blur.sigma_px[0] <= blur.sigma_x <= config.blur.sigma_px[1]
        assert -math.pi <= blur.theta <= math.pi
        is_round = (blur.sigma_x, 0.0) == (blur.sigma_y, blur.theta)
        assert is_round != blur.kind.endswith("aniso")


@pytest.fixture(scope="module")
def many():
    return [draw(seed) for seed in range(1500)]


def test_frequencies_are_those_of_the_preset(many):
    first, second = ([params.stages[i] for params in many] for i in (0, 1))
    kinds = [stage.blur.kind for stage in first]  # every first stage blurs
    others = [kind for kind in kinds if kind != "sinc"]
    shares = {
        0.8: [[s.blur is not None for s in second], [p.final_sinc is not None for p in many]],
        0.7: [[s.resize_factor < 1 for s in first]],
        0.5: [[s.noise.kind == "gaussian" for s in first], [p.jpeg_before_resize for p in many]],
        0.4: [[s.noise.is_gray for s in first]],
        0.3: [[s.resize_factor > 1 for s in second]],
        0.1: [[kind == "sinc" for kind in kinds]],
    }
    for kind, weight in zip(KERNEL_KINDS, PRESET.stages[0].blur.kind_weights, strict=True):
        shares.setdefault(weight, []).append([k == kind for k in others])
    for share, lists in shares.items():
        for events in lists:
            assert np.mean(events) == pytest.approx(share, abs=0.04)


def test_half_of_the_shapes_lie_on_each_side_of_one(many):
    blurs = [stage.blur for params in many for stage in params.stages if stage.blur is not None]
    generalized, plateaus = (
        np.array([blur.beta for blur in blurs if blur.kind.startswith(kind)])
        for kind in ("generalized", "plateau")
    )
    assert np.mean(generalized < 1) == pytest.approx(0.5, abs=0.07)
    assert 0.5 <= generalized.min() <= generalized.max() <= 4
    # Real-ESRGAN's plateaus start at 1, so the lower half is exactly 1.
    assert np.mean(plateaus == 1) == pytest.approx(0.5, abs=0.07)
    assert 1 <= plateaus.min() <= plateaus.max() <= 2


def test_scales_are_whole_numbers_from_one():
    params = draw(0, PRESETS["mild"], scale=np.int64(2))
    assert as_json(params) == params
    with pytest.raises(TypeError):
        draw(0, scale=2.5)
    with pytest.raises(ValueError, match="scale must be at least 1"):
        draw(0, scale=0)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (PRESET.stages[0].blur, {"probability": 1.2}, "probability"),
        (PRESET.stages[0].blur, {"size_px": (8, 21)}, "odd"),
        (PRESET.stages[0].blur, {"kind_weights": (1.0,)}, "6 weights"),
        (PRESET.stages[0].blur, {"kind_weights": (0.5,) * 6}, "sum to 1"),
        (PRESET.stages[0].blur, {"sigma_px": (3.0, 0.2)}, "ordered and in"),
        (PRESET.stages[0], {"resize_factor": (1.2, 1.5)}, "enclose 1"),
        (PRESET.stages[0], {"resize_weights": (0.5, 0.5)}, "resize_weights must have 3"),
        (PRESET.stages[0], {"resize_weights": (0.5, 0.5, 0.5)}, "three probabilities summing to 1"),
        (PRESET.stages[0], {"gaussian_probability": -0.1}, "gaussian_probability"),
        (PRESET.stages[0], {"gray_probability": float("nan")}, "gray_probability"),
        (PRESET.stages[0], {"gaussian_sigma": (30.0, 1.0)}, "gaussian_sigma"),
        (PRESET.stages[0], {"poisson_scale": (-1.0, 1.0)}, "poisson_scale"),
        (PRESET.stages[0], {"jpeg_quality": (0.0, 95.0)}, "jpeg_quality"),
        (PRESET, {"stages": PRESET.stages * 2}, "at most two"),
        (PRESET, {"final_sinc_probability": 1.5}, "final_sinc_probability"),
        (PRESET, {"final_sinc_size_px": (7, 20)}, "odd"),
        (PRESET, {"final_sinc_size_px": (21, 7)}, "ordered"),
    ],
)
def test_configurations_say_what_must_hold_and_what_came(part, change, message):
    with pytest.raises(ValueError, match=rf"{message}.*got"):
        dataclasses.replace(part, **change)


def test_presets_cannot_be_changed():
    with pytest.raises(TypeError):
        PRESETS["own"] = DegradationConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESET.final_sinc_probability = 0.0
