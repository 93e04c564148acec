import pytest
import torch
from safetensors.torch import load_file

from tadsr.training.losses import (
    PatchDiscriminator,
    blur_at_timesteps,
    blurred_mse,
    chroma_mse,
    discriminator_loss,
    generator_loss,
    gradient_l1,
    mse_per_sample,
)

TIMESTEPS = [0, 1, 199, 200, 399, 500, 999]


@pytest.fixture(scope="module")
def blur(data_dir):
    return load_file(data_dir / "blur.safetensors")


@pytest.mark.parametrize("timestep", TIMESTEPS)
def test_blur_matches_the_published_figures(timestep, blur):
    got = blur_at_timesteps(blur["blur.x"], torch.tensor([timestep]))
    torch.testing.assert_close(got, blur[f"blur.{timestep}"], atol=1e-6, rtol=0)


def test_blurred_mse_matches_per_sample(blur):
    assert blur["blur.timesteps"].tolist() == TIMESTEPS
    x = blur["blur.x"].expand(len(TIMESTEPS), -1, -1, -1)
    y = blur["blur.y"].expand(len(TIMESTEPS), -1, -1, -1)
    got = blurred_mse(x, y, blur["blur.timesteps"])
    torch.testing.assert_close(got, blur["blur.mse"], atol=1e-6, rtol=1e-5)


def test_blurring_hides_detail_and_keeps_brightness():
    detail = torch.zeros(1, 3, 32, 32)
    detail[..., ::2] = 1
    flat = torch.full_like(detail, 0.5)
    t = torch.tensor([999])
    assert blurred_mse(detail, flat, t) < 1e-3 * mse_per_sample(detail, flat)
    shifted = flat + 0.1
    torch.testing.assert_close(blurred_mse(shifted, flat, t), mse_per_sample(shifted, flat))


def test_chroma_mse_ignores_brightness_and_counts_colour():
    image = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(chroma_mse(image + 0.2, image), torch.zeros(2))
    tinted = image + torch.tensor([0.0, 0.3, 0.0])[None, :, None, None]
    torch.testing.assert_close(chroma_mse(tinted, image), torch.full((2,), 0.09))


def test_the_gradient_error_sees_edges_and_no_offset():
    image = torch.rand(2, 3, 8, 8)
    assert gradient_l1(image + 0.3, image).max() < 1e-6
    edge = torch.zeros(1, 1, 4, 4)
    edge[..., 2:] = 1
    # 4 of 12 pairs in a row differ by 1, none of a column.
    assert gradient_l1(edge, torch.zeros_like(edge)).item() == pytest.approx((4 / 12) / 2)


def test_the_discriminator_learns_to_tell_two_kinds_apart():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(width=8)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=2e-3)

    def draw():
        noise = torch.randn(4, 3, 32, 32)
        return noise, torch.nn.functional.avg_pool2d(noise, 3, 1, 1)

    for _ in range(40):
        real, fake = draw()
        loss = discriminator_loss(discriminator(real), discriminator(fake)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    real, fake = draw()
    assert discriminator(real).shape == (4, 1, 4, 4)
    assert generator_loss(discriminator(fake)).mean() > generator_loss(discriminator(real)).mean()
    assert loss < 0.9


def test_hinge_losses_stop_where_the_scores_are_clear():
    real, fake = torch.full((2, 1, 3, 3), 2.0), torch.full((2, 1, 3, 3), -2.0)
    assert discriminator_loss(real, fake).tolist() == [0, 0]
    assert discriminator_loss(fake, real).tolist() == [3, 3]
    assert generator_loss(real).tolist() == [-2, -2]
