"""The tensor JPEG gives what Pillow's codec gives."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features

from tadsr.degradation import PRESETS, apply_degradation, sample_degradation
from tadsr.degradation.jpeg import compress_jpeg, simulate_jpeg

SIDES = st.integers(1, 40)
is_turbo = pytest.mark.skipif(
    not features.check_feature("libjpeg_turbo"), reason="another libjpeg rounds otherwise"
)


@pytest.fixture(scope="module")
def photo(data_dir):
    with Image.open(data_dir / "kodim19_crop.png") as image:
        pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def assert_equal(image, quality):
    got = simulate_jpeg(image[None], [quality])[0]
    torch.testing.assert_close(got, compress_jpeg(image, quality), atol=1e-6, rtol=0)


def test_on_the_cpu_it_is_pillows_own(photo):
    image = photo[:, :17, :23]
    pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(buffer := io.BytesIO(), "JPEG", quality=40)
    got = (compress_jpeg(image, 40.2) * 255).round().byte().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(got, np.asarray(Image.open(buffer)))


@is_turbo
@pytest.mark.parametrize("quality", [5, 30, 49, 50, 75, 95, 100])
@pytest.mark.parametrize("size", [(128, 128), (97, 101), (64, 33), (17, 16), (1, 1), (8, 90)])
def test_a_photo_comes_out_as_from_pillow(quality, size, photo):
    assert_equal(photo[:, : size[0], : size[1]], quality)


@is_turbo
@given(SIDES, SIDES, st.integers(1, 100), st.integers(0, 99), st.sampled_from((2, 5, 40)))
def test_any_image_comes_out_as_from_pillow(height, width, quality, seed, detail):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, detail, detail, generator=generator)
    image = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    assert_equal(image[0], quality)


@is_turbo
@pytest.mark.parametrize("quality", [1, 10, 50, 95])
def test_extreme_pixels_come_out_as_from_pillow(quality):
    generator = torch.Generator().manual_seed(quality)
    assert_equal((torch.rand(3, 48, 57, generator=generator) > 0.5).float(), quality)


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


@is_turbo
def test_the_whole_degradation_is_the_same_with_the_tensor_jpeg(photo, monkeypatch):
    hq = photo[None] * 2 - 1
    rngs = map(np.random.default_rng, range(6))
    params = [sample_degradation(rng, PRESETS["realesrgan"]) for rng in rngs]
    with_pillow = [apply_degradation(hq, p) for p in params]
    qualities = []

    def compress(image, quality):
        qualities.append(quality)
        return simulate_jpeg(image[None], [quality])[0]

    monkeypatch.setattr("tadsr.degradation.apply.compress_jpeg", compress)
    for expect, item in zip(with_pillow, params, strict=True):
        torch.testing.assert_close(apply_degradation(hq, item), expect, atol=1e-6, rtol=0)
    assert qualities == [stage.jpeg_quality for item in params for stage in item.stages]


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
