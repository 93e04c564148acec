"""One image at several timesteps, against calls with each."""

import numpy as np
import pytest
import torch
from PIL import Image

import tadsr.restorer
from tadsr.measure.metrics import make_metric
from tadsr.measure.sweep import TimestepSweep
from tadsr.onestep import TileSpec
from tadsr.onestep.tasks import TOGETHER_PIXELS, group_timesteps


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 14, 4), np.uint8))


@pytest.mark.parametrize("tiling", [None, TileSpec(band_bytes=2**18, attention_px=0)])
def test_a_sweep_gives_what_calls_give(pipe, image, tiling, monkeypatch):
    options = {"scale": 3, "color_fix": "wavelet", "process_size": 0, "tiling": tiling}
    expect = [pipe(image, t, **options) for t in (900, 1, 500)]
    together = []

    def in_twos(timesteps, size, device):
        assert size == (27, 42)
        together.append(timesteps)
        return [timesteps[:2], timesteps[2:]]

    monkeypatch.setattr(tadsr.restorer, "group_timesteps", in_twos)
    seen = []
    found = pipe.sweep(image, (900, 1, 500), progress=seen.append, **options)
    assert together == [[900, 1, 500]]
    assert seen[-1] == 1
    assert [result.mode for result in found] == ["RGBA"] * 3
    for a, b in zip(found, expect, strict=True):
        assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1


def test_timesteps_go_together_on_an_accelerator_as_far_as_they_fit():
    timesteps, cpu, device = [0, 1, 2, 3, 4], torch.device("cpu"), torch.device("meta")
    assert group_timesteps(timesteps, (8, 8), cpu) == [[t] for t in timesteps]
    side = int((TOGETHER_PIXELS / 2) ** 0.5)
    assert group_timesteps(timesteps, (side, side), device) == [[0, 1], [2, 3], [4]]
    assert group_timesteps(timesteps, (8 * side, side), device) == [[t] for t in timesteps]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timesteps": ()}, "at least one, got none"),
        ({"timesteps": (1, 1000)}, "0..999, got 1000"),
        ({"scale": 0.5}, "at least 1"),
    ],
)
def test_wrong_arguments_are_refused(pipe, image, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe.sweep(image, **arguments)
    with pytest.raises(TypeError, match="guidance_scale"):
        pipe.sweep(image, guidance_scale=2)


def test_the_part_shown_has_detail_and_differs():
    first = np.full((40, 60, 3), 128, np.uint8)
    first[:, 30:] = np.random.default_rng(0).integers(100, 156, (40, 30, 3), np.uint8)
    second = first.copy()
    second[:20] += 9  # differs, also where it is flat
    found = TimestepSweep(first[::4, ::4], {1: first, 900: second})
    box = found.find_box()
    assert box.left >= 25
    assert box.bottom <= 22
    single = TimestepSweep(first[::4, ::4], {1: first}).find_box()
    assert single.left >= 25
    with pytest.raises(ValueError, match="original"):
        found.measure([make_metric("detail")])
