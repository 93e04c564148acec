import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from tadsr.schedule import add_noise, eps_to_x0, make_alphas_cumprod, residual_to_x0

TIMESTEPS = st.lists(st.integers(0, 999), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def ddpm():
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def test_alphas_cumprod_are_those_of_diffusers(ddpm):
    torch.testing.assert_close(make_alphas_cumprod(), ddpm.alphas_cumprod, atol=1e-7, rtol=1e-5)
    linear = DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    torch.testing.assert_close(
        make_alphas_cumprod(1e-4, 0.02, "linear"), linear.alphas_cumprod, atol=1e-7, rtol=1e-5
    )


def test_add_noise_is_that_of_diffusers(ddpm):
    x0, eps = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    timesteps = torch.tensor([0, 500, 999])
    torch.testing.assert_close(
        add_noise(x0, eps, timesteps, make_alphas_cumprod()), ddpm.add_noise(x0, eps, timesteps)
    )


@given(TIMESTEPS, st.integers(0, 2**31))
def test_eps_to_x0_undoes_add_noise(timesteps, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (len(timesteps), 2, 3, 3)
    x0 = torch.randn(shape, generator=generator, dtype=torch.float64)
    eps = torch.randn(shape, generator=generator, dtype=torch.float64)
    t, alphas = torch.tensor(timesteps), make_alphas_cumprod()
    torch.testing.assert_close(eps_to_x0(add_noise(x0, eps, t, alphas), eps, t, alphas), x0)


@given(TIMESTEPS)
def test_residual_to_x0_divides_and_subtracts_per_item(timesteps):
    alphas = make_alphas_cumprod()
    latents = torch.ones(len(timesteps), 1, 1, 1)
    x0 = residual_to_x0(latents, 0.25 * latents, torch.tensor(timesteps), alphas)
    for row, t in enumerate(timesteps):
        assert x0[row].item() == pytest.approx(alphas[t].item() ** -0.5 - 0.25, rel=1e-5)


@pytest.mark.parametrize("betas", [(0, 0.01), (0.02, 0.01), (0.1, 1.0)])
def test_impossible_betas_are_refused(betas):
    with pytest.raises(ValueError, match="betas must satisfy"):
        make_alphas_cumprod(*betas)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="squaredcos"):
        make_alphas_cumprod(beta_schedule="squaredcos_cap_v2")
