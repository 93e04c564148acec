"""The tensor JPEG gives what Pillow's codec gives."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tadsr.training.degradation import PRESETS, apply_degradation, sample_degradation
from tadsr.training.degradation.jpeg import compress_jpeg, simulate_jpeg


@pytest.fixture(scope="module")
def photo(data_dir):
    with Image.open(data_dir / "kodim19_crop.png") as image:
        pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def compare(image, quality):
    got = simulate_jpeg(image[None], [quality])[0]
    return ((got - compress_jpeg(image, quality)) * 255).abs()


@pytest.mark.parametrize("quality", [5, 30, 50, 75, 95, 100])
@pytest.mark.parametrize("size", [(128, 128), (97, 101), (64, 33), (17, 16), (1, 1), (8, 90)])
def test_a_photo_comes_out_as_from_pillow(quality, size, photo):
    error = compare(photo[:, : size[0], : size[1]], quality)
    assert error.mean() < 0.3  # levels of 255
    assert error.max() < 8.5


@settings(max_examples=25)
@given(st.integers(16, 48), st.integers(16, 48), st.integers(10, 100), st.integers(0, 99))
def test_smooth_images_of_any_size_come_out_as_from_pillow(height, width, quality, seed):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 4, 4, generator=generator)
    image = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    # One coefficient on the other side of a rounding is 1/8 of its step in every pixel.
    assert compare(image[0], quality).mean() < 2


def test_each_image_has_its_own_quality(photo):
    batch = torch.stack([photo[:, :64, :64], photo[:, 32:96, 32:96]])
    both = simulate_jpeg(batch, torch.tensor([30.0, 90.0]))
    for i, quality in enumerate((30, 90)):
        torch.testing.assert_close(both[i], simulate_jpeg(batch[i : i + 1], [quality])[0])


def test_lower_quality_loses_more(photo):
    errors = [(simulate_jpeg(photo[None], [q])[0] - photo).square().mean() for q in (95, 60, 20)]
    assert errors == sorted(errors)


@pytest.mark.parametrize(
    ("shape", "quality"), [((1, 3, 8, 8), [0]), ((2, 3, 8, 8), [50]), ((1, 1, 8, 8), [50])]
)
def test_wrong_arguments_are_refused(shape, quality):
    with pytest.raises(ValueError, match="must"):
        simulate_jpeg(torch.zeros(shape), quality)


def test_the_whole_degradation_is_the_same_with_the_tensor_jpeg(photo, monkeypatch):
    hq = photo[None] * 2 - 1
    params = [draw_without_poisson(seed) for seed in range(6)]
    with_pillow = [apply_degradation(hq, p) for p in params]
    monkeypatch.setattr(
        "tadsr.training.degradation.apply.compress_jpeg",
        lambda image, quality: simulate_jpeg(image[None], [quality])[0],
    )
    with_torch = [apply_degradation(hq, p) for p in params]
    errors = [(a - b).abs().mean() * 127.5 for a, b in zip(with_pillow, with_torch, strict=True)]
    assert max(errors) < 1  # of 255 levels
    assert max(errors) > 0  # the other path was taken


def draw_without_poisson(seed):
    """Poisson noise draws anew where its input differs by a level; Gaussian noise does not."""
    params = sample_degradation(np.random.default_rng(seed), PRESETS["realesrgan"])
    stages = [
        dataclasses.replace(
            s,
            noise=dataclasses.replace(s.noise, kind="gaussian", strength=min(s.noise.strength, 9)),
        )
        for s in params.stages
    ]
    return dataclasses.replace(params, stages=tuple(stages))


@pytest.mark.gpu
def test_a_gpu_degrades_as_the_cpu_does(photo):
    hq = photo[None] * 2 - 1
    for seed in range(8):
        params = draw_without_poisson(seed)
        on_gpu = apply_degradation(hq.cuda(), params).cpu()
        assert (on_gpu - apply_degradation(hq, params)).abs().mean() * 127.5 < 1
