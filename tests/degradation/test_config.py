import dataclasses

import pytest

from tadsr.degradation import PRESETS, DegradationConfig

PRESET = PRESETS["realesrgan"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resize_weights": (0.5, 0.5)}, "resize_weights must have 3"),
        ({"resize_weights": (0.5, 0.5, 0.5)}, "three probabilities"),
        ({"gaussian_probability": -0.1}, "gaussian_probability"),
        ({"gray_probability": float("nan")}, "gray_probability"),
        ({"gaussian_sigma": (30.0, 1.0)}, "gaussian_sigma"),
        ({"poisson_scale": (-1.0, 1.0)}, "poisson_scale"),
        ({"jpeg_quality": (0.0, 95.0)}, "jpeg_quality"),
    ],
)
def test_stages_say_what_must_hold_and_what_came(change, message):
    with pytest.raises(ValueError, match=rf"{message}.*got"):
        dataclasses.replace(PRESET.stages[0], **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": PRESET.stages * 2}, "at most two"),
        ({"final_sinc_probability": 1.5}, "final_sinc_probability"),
        ({"final_sinc_size_px": (7, 20)}, "odd"),
        ({"final_sinc_size_px": (21, 7)}, "ordered"),
    ],
)
def test_pipelines_say_what_must_hold_and_what_came(change, message):
    with pytest.raises(ValueError, match=rf"{message}.*got"):
        dataclasses.replace(PRESET, **change)


def test_presets_cannot_be_changed():
    with pytest.raises(TypeError):
        PRESETS["own"] = DegradationConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESET.final_sinc_probability = 0.0
