"""What the recipe asks of pictures beside distances."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

from tadsr.measure.spectrum import log_spectrum, peaks_above

RECIPE = Path(__file__).parents[2] / "examples" / "recipes" / "tiny"


@pytest.fixture
def losses(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPE))
    return importlib.import_module("inherit_losses")


def test_only_the_faithful_end_is_held_back_by_the_input(losses):
    hq, lq = torch.full((3, 3, 32, 32), 0.5), torch.zeros(3, 3, 32, 32)
    image = hq.clone().requires_grad_()
    timesteps = torch.tensor([1, 50, losses.DAMPED_BELOW])
    losses.faithful_error(image, hq, lq, timesteps).sum().backward()
    pull = image.grad.mean((1, 2, 3))  # above 0: a step goes from the original to the input
    assert pull[0] > pull[1] > pull[2] == 0


def test_a_pattern_on_the_grid_shows(losses):
    noise = torch.randn(8, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    pattern = torch.zeros(128)
    pattern[::4] = 1.0
    assert losses.grid_pattern(noise).abs().max() < 0.5
    for rows in (noise + pattern, noise + pattern[:, None]):
        assert losses.grid_pattern(rows).min() > 2


def test_a_wave_shows_and_is_evened_out(losses):
    noise = torch.randn(16, 3, 160, 160, generator=torch.Generator().manual_seed(0)) * 0.1
    rows, columns = torch.arange(160)[:, None], torch.arange(160)
    wave = 0.05 * torch.sin(2 * np.pi * (18 * rows - 6 * columns) / 64)
    original = log_spectrum(noise)
    above = peaks_above(log_spectrum(noise + wave), original)
    assert losses.wave_error(noise, noise) == 0
    assert above[18, -6] == above.max() > 1
    images = (noise + wave).requires_grad_()
    losses.wave_error(images, noise).backward()
    assert (images.grad * wave).sum() > 0  # a step takes the wave away


def test_blocks_show_and_are_evened_out(losses):
    pattern = losses.block_pattern
    noise = torch.randn(16, 3, 192, 160, generator=torch.Generator().manual_seed(0)) * 0.1
    blocks = torch.zeros(192, 160)
    blocks[:, ::32] = 0.3
    assert pattern(noise).shape == (16, 2, 15)
    assert pattern(noise).mean(0).abs().max() < 0.2
    along_rows, along_columns = pattern(noise + blocks).mean(0)
    assert along_rows.min() > 0.5
    assert along_columns.abs().max() < 0.2
    images = (noise + blocks).requires_grad_()
    (pattern(images) - pattern(noise)).square().mean().backward()
    assert (images.grad * blocks).sum() > 0  # a step takes the blocks away


def test_detail_is_compared_wherever_it_lies(losses):
    error = losses.detail_error
    generator = torch.Generator().manual_seed(0)
    noise, hq, restored = torch.randn(3, 4, 3, 96, 96, generator=generator) * 0.1
    assert error(noise, noise, noise).tolist() == [0] * 4
    assert error(noise, hq, restored).max() < 0.2  # the same energy, nowhere the same pixels
    images = (noise * 0.5).requires_grad_()
    found = error(images, hq, restored)
    assert found.min() > 1
    found.mean().backward()
    assert (images.grad * noise).sum() < 0  # a step makes more of it
    # Waves of another length are not the same detail, however strong.
    waves = [torch.cos(2 * torch.pi * torch.arange(96) / px).expand(1, 3, 96, 96) for px in (4, 6)]
    assert error(waves[0], waves[1], waves[1]) > 1


def test_no_more_detail_is_asked_for_than_the_original_has(losses):
    error = losses.detail_error
    sharp = torch.randn(4, 3, 96, 96, generator=torch.Generator().manual_seed(0)) * 0.1
    soft = sharp * 0.3
    assert error(soft, soft, sharp).max() < 0.01 < 1 < error(sharp, soft, sharp).min()
    assert error(soft, sharp, soft).max() < 0.01 < 1 < error(sharp, sharp, soft).min()


def test_the_restorer_is_followed_only_where_it_is_closer(losses):
    imitation = losses.imitation_weight
    timesteps = torch.tensor([0, 999, 999])
    weights = imitation(timesteps, torch.tensor([True, True, False]))
    assert weights.tolist()[::2] == [0, 0]
    assert weights[1] > 1


def test_fine_structure_is_fitted_place_by_place(losses):
    noise = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 0.1
    hq, light, strongest = 0.2 + noise, torch.full_like(noise, 0.2), torch.tensor([1.5, 2.0])
    found = losses.fitted(light + 0.8 * noise, hq, strongest)
    torch.testing.assert_close(found, hq, rtol=0, atol=0.03)
    fine = noise - losses._blurred(noise, losses._FINE_PX)
    weakest, most = losses._WEAKEST, strongest.view(-1, 1, 1, 1)
    for share, original, gain in ((1.0, light, weakest), (0.1, hq, most)):
        images = light + share * noise
        found = losses.fitted(images, original, strongest)
        expected = images + (gain - 1) * share * fine
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    # One place says nothing about another.
    half = hq.clone()
    half[..., :48] = 0.2
    found = losses.fitted(hq, half, strongest)
    torch.testing.assert_close(found[..., 72:], hq[..., 72:], rtol=0, atol=1e-3)
    assert (found - light)[..., :24].std() < 0.7 * noise[..., :24].std()
