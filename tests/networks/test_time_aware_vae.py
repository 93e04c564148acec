import pytest
import torch
from diffusers import AutoencoderKL

from tadsr.networks.time_aware_vae import TimeAwareAutoencoderKL

SMALL = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (12, 24),
    "layers_per_block": 1,
    "latent_channels": 5,
    "norm_num_groups": 3,
}


@pytest.fixture
def small_vae():
    torch.manual_seed(0)
    return TimeAwareAutoencoderKL(**SMALL).eval()


def test_full_size_names_and_shapes_are_the_published_ones(official_layout):
    with torch.device("meta"):
        vae = TimeAwareAutoencoderKL.from_config(official_layout["configs"]["time_vae"])
    shapes = {name: list(tensor.shape) for name, tensor in vae.state_dict().items()}
    assert shapes == official_layout["time_vae_state_dict"]
    assert len(shapes) == 272
    assert sum(p.numel() for p in vae.parameters()) == 85_726_439


def test_groups_channels_and_levels_come_from_the_config(small_vae):
    x = torch.randn(2, 3, 10, 14)
    posterior = small_vae.encode(x, 7).latent_dist
    assert posterior.mode().shape == (2, 5, 5, 7)
    assert small_vae.decode(posterior.mode()).sample.shape == x.shape
    assert small_vae.downscale_factor == 2
    attention = small_vae.encoder.mid_block.attentions[0]
    assert attention.heads == 1
    assert attention.to_q.in_features == 24


@torch.no_grad()
def test_zero_time_layers_give_diffusers_own_autoencoder(small_vae):
    for resnet in small_vae.encoder.time_conditioned_resnets():
        resnet.time_emb_proj.weight.zero_()
        resnet.time_emb_proj.bias.zero_()
    plain = AutoencoderKL(**SMALL).eval()
    plain.load_state_dict(
        {k: v for k, v in small_vae.state_dict().items() if "time_emb" not in k}, strict=True
    )
    x = torch.randn(1, 3, 16, 12)
    torch.testing.assert_close(
        small_vae.encode(x, 321).latent_dist.parameters, plain.encode(x).latent_dist.parameters
    )
    z = torch.randn(1, 5, 4, 4)
    torch.testing.assert_close(small_vae.decode(z).sample, plain.decode(z).sample)


@torch.no_grad()
def test_each_item_of_a_batch_has_its_own_timestep(small_vae):
    x = torch.randn(1, 3, 8, 8).expand(3, -1, -1, -1)
    together = small_vae.encode(x, torch.tensor([1, 500, 999])).latent_dist.mode()
    for row, timestep in enumerate((1, 500, 999)):
        alone = small_vae.encode(x[:1], timestep).latent_dist.mode()
        torch.testing.assert_close(together[row : row + 1], alone)
    assert (together[0] - together[1]).abs().max() > 1e-3
    assert (together[1] - together[2]).abs().max() > 1e-3


def test_the_wrong_number_of_timesteps_is_refused(small_vae):
    with pytest.raises(ValueError, match=r"one value or one per image \(3\), got 2"):
        small_vae.encode(torch.zeros(3, 3, 8, 8), torch.tensor([1, 2]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"time_scale_shift": "default"}, "time_scale_shift"),
        ({"down_block_types": ("AttnDownEncoderBlock2D",) * 2}, "block types"),
        ({"block_out_channels": (12, 24, 24)}, "one entry per level"),
    ],
)
def test_configurations_that_cannot_work_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TimeAwareAutoencoderKL(**SMALL | change)


def test_save_and_load_round_trip(small_vae, tmp_path):
    small_vae.save_pretrained(tmp_path)
    again = TimeAwareAutoencoderKL.from_pretrained(tmp_path)
    assert again.config.latent_channels == 5
    state = small_vae.state_dict()
    torch.testing.assert_close(dict(again.state_dict()), dict(state), atol=0, rtol=0)
