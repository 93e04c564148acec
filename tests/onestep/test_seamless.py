"""Textures tile again: a rolled input gives the rolled result."""

import numpy as np
import pytest
import torch
from PIL import Image

from tadsr import TADSRPipeline
from tadsr.conditioning import TimestepMap
from tadsr.config import SEAMLESS_MARGIN_PX as MARGIN_PX
from tadsr.config import UpscaleSettings
from tadsr.images import resize_bicubic, resize_wrapped
from tadsr.onestep import TileSpec
from tadsr.onestep.upscaling import extend_map


def texture(height, width, channels=3):
    """Return waves that go on beyond the edges, uint8."""
    y, x = np.mgrid[:height, :width]
    waves = [
        np.sin(2 * np.pi * ((band + 1) * y / height + 2 * x / width) + band)
        for band in range(channels)
    ]
    return np.uint8(127 + 100 * np.stack(waves, -1))


def rolled_apart(pipe, pixels, shift, scale, timestep=300, rolled_timestep=300, **options):
    """Return by how many levels the rolled input's result is not the rolled result."""
    options |= {"process_size": 0, "scale": scale}
    whole = pipe(pixels, timestep, **options).astype(int)
    rolled = pipe(np.roll(pixels, shift, (0, 1)), rolled_timestep, **options)
    difference = np.roll(whole, tuple(scale * n for n in shift), (0, 1)) - rolled
    return np.abs(difference).max()


@pytest.mark.parametrize(
    ("seamless", "shift", "scale", "options"),
    [
        # By the grid of the networks: less than that changes their results by itself.
        ("both", (4, 8), 4, {}),
        ("y", (4, 0), 2, {"color_fix": "wavelet", "tiling": TileSpec()}),
    ],
)
def test_a_rolled_texture_gives_the_rolled_result(pipe, seamless, shift, scale, options):
    pixels = texture(16, 24)
    apart = rolled_apart(pipe, pixels, shift, scale, seamless=seamless, **options)
    assert apart <= 5
    assert rolled_apart(pipe, pixels, shift, scale, **options) > 3 * max(apart, 2)


def test_maps_go_around_as_well():
    settings = UpscaleSettings(seamless="both")
    steps = torch.ones(8, 12)
    steps[:4, 5:] = 700
    maps = [TimestepMap(values) for values in (steps, steps.roll((2, 3), (0, 1)))]
    values, rolled = (extend_map(each, (32, 48), settings).values for each in maps)
    assert values.shape == (32 + 2 * MARGIN_PX, 48 + 2 * MARGIN_PX)
    inner = (slice(MARGIN_PX, MARGIN_PX + 32), slice(MARGIN_PX, MARGIN_PX + 48))
    torch.testing.assert_close(values[inner].roll((8, 12), (0, 1)), rolled[inner])


def test_alpha_goes_around_at_any_size_and_scale_in_any_kind(model_dir, monkeypatch):
    # Alpha passes no network, which alone needs a wide margin.
    monkeypatch.setattr("tadsr.config.SEAMLESS_MARGIN_PX", 32)
    pipe = TADSRPipeline.from_pretrained(model_dir)
    options = {"seamless": "both", "process_size": 0}
    pixels = texture(8, 12, 4)
    whole, rolled = (pipe(each, **options) for each in (pixels, np.roll(pixels, (2, 3), (0, 1))))
    apart = np.roll(whole, (8, 12), (0, 1))[..., 3].astype(int) - rolled[..., 3]
    assert np.abs(apart).max() <= 1
    steps = np.full((8, 12), 5)
    assert pipe(Image.fromarray(texture(7, 9)), steps, scale=1.5, **options).size == (14, 10)
    results = pipe.sweep(torch.rand(3, 5, 8), [1, 900], **options)
    assert [result.shape for result in results] == [(3, 20, 32)] * 2


@pytest.mark.parametrize("size", [(24, 30), (15, 21), (5, 4)])
def test_resizing_goes_around(size):
    x = torch.rand(1, 3, 10, 12)
    wide = resize_bicubic(x.repeat(1, 1, 3, 3), tuple(3 * side for side in size))
    height, width = size
    middle = wide[..., height : 2 * height, width : 2 * width]
    torch.testing.assert_close(resize_wrapped(x, size, (True, True)), middle, atol=1e-5, rtol=0)


def test_what_seamless_may_be(pipe):
    with pytest.raises(ValueError, match="seamless must be one of both, x, y"):
        pipe(texture(8, 8), seamless="z")
