import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tadsr.degradation import PRESETS, DegradationParams, sample_degradation
from tadsr.degradation.sample import SMALL_SINC_PX, KernelParams

SEEDS = st.integers(0, 2**32)


def only(kind_weights=(1.0, 0, 0, 0, 0, 0), sinc=0.0):
    """Return the Real-ESRGAN preset with one family of kernels in its first order."""
    preset = PRESETS["realesrgan"]
    blur = dataclasses.replace(
        preset.stages[0].blur, kind_weights=kind_weights, sinc_probability=sinc
    )
    stage = dataclasses.replace(preset.stages[0], blur=blur)
    return dataclasses.replace(preset, stages=(stage, preset.stages[1]))


ROUND, TURNED, SINC = only(), only((0, 1.0, 0, 0, 0, 0)), only(sinc=1.0)


def first_blur(seed, config) -> KernelParams:
    return sample_degradation(np.random.default_rng(seed), config).stages[0].blur


@given(SEEDS)
def test_a_sinc_is_cut_off_higher_when_it_is_small(seed):
    blur = first_blur(seed, SINC)
    assert blur.kind == "sinc"
    assert math.pi / (3 if blur.size < SMALL_SINC_PX else 5) <= blur.cutoff <= math.pi


@given(SEEDS)
def test_the_final_sinc_is_an_odd_low_pass(seed):
    sinc = sample_degradation(np.random.default_rng(seed), PRESETS["realesrgan"]).final_sinc
    if sinc is not None:
        assert sinc.size in range(7, 22, 2)
        assert math.pi / 3 <= sinc.cutoff <= math.pi


@given(SEEDS)
def test_isotropic_kernels_are_round_and_others_turned(seed):
    iso, aniso = first_blur(seed, ROUND), first_blur(seed, TURNED)
    assert (iso.sigma_x, iso.theta) == (iso.sigma_y, 0.0)
    assert -math.pi <= aniso.theta <= math.pi
    assert aniso.sigma_x != aniso.sigma_y


def test_half_of_the_shapes_lie_on_each_side_of_one():
    generalized, plateaus = only((0, 0, 1.0, 0, 0, 0)), only((0, 0, 0, 0, 1.0, 0))
    generalized = [first_blur(seed, generalized).beta for seed in range(600)]
    assert np.mean(np.array(generalized) < 1) == pytest.approx(0.5, abs=0.07)
    assert 0.5 <= min(generalized) <= max(generalized) <= 4
    # Real-ESRGAN's plateaus start at 1, so the lower half is exactly 1.
    plateau = [first_blur(seed, plateaus).beta for seed in range(600)]
    assert np.mean(np.array(plateau) == 1) == pytest.approx(0.5, abs=0.07)
    assert 1 <= min(plateau) <= max(plateau) <= 2


def test_a_numpy_scale_survives_json():
    params = sample_degradation(np.random.default_rng(0), PRESETS["mild"], scale=np.int64(2))
    assert DegradationParams.from_dict(json.loads(json.dumps(params.to_dict()))) == params


def test_a_fractional_scale_is_refused():
    with pytest.raises(TypeError):
        sample_degradation(np.random.default_rng(0), PRESETS["mild"], scale=2.5)
