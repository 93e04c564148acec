"""Small models that have every layer of the full one: attention in the autoencoder, odd groups."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from tadsr import TimeAwareAutoencoderKL
from tadsr.schedule import make_alphas_cumprod
from tests.small_models import OUTER_ATTENTION, small_unet, small_vae


def build_networks(
    widths=(8, 8, 16), groups=4, **unet_options
) -> tuple[TimeAwareAutoencoderKL, UNet2DConditionModel]:
    torch.manual_seed(0)
    vae = small_vae(widths, norm_num_groups=groups)
    options = {"cross_attention_dim": 6, **OUTER_ATTENTION, **unet_options}
    unet = small_unet((8, 16), norm_num_groups=groups, **options)
    for network in (vae, unet):
        network.eval().requires_grad_(False)
        for name, values in network.named_parameters():
            # Values that a mistake in folding would show in: torch's biases are nearly 0.
            values.normal_(float(name.endswith("norm1.weight")), 0.2)
    return vae, unet


@pytest.fixture
def networks():
    return build_networks()


@pytest.fixture(scope="session")
def alphas_cumprod():
    return make_alphas_cumprod()


@pytest.fixture
def exact_products():
    """Without TF32, in which no two implementations agree."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    with torch.no_grad():
        yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def make_inputs(batch=1, height=24, width=32, timesteps=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(batch + height)
    lq = torch.rand(batch, 3, height, width, generator=generator) * 2 - 1
    embeds = torch.randn(batch, 5, 6, generator=generator)
    timesteps = torch.tensor(timesteps or [500] * batch)
    return lq.to(dtype), timesteps, embeds.to(dtype)


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result.double() - expected).norm() / expected.double().norm()).item()
