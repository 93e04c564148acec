"""Networks computed in bands against the same networks as a whole."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st

from tadsr import TADSRPipeline
from tadsr.networks import walk
from tadsr.onestep import banded_layers
from tadsr.onestep.activations import ComputedActivation
from tadsr.onestep.banded_layers import Bands
from tadsr.onestep.banded_walk import BandedLayers
from tadsr.onestep.storage import BandStorage, PlannedStorage
from tadsr.onestep.support import check_unet
from tests.crossings import crossed

from .conftest import relative_error

CPU = torch.device("cpu")
SMALLEST = 1  # bytes of a band: one row at a time
UNET_SIZES = ((8, 8), (13, 7), (1, 9), (22, 18))


@pytest.fixture(scope="module")
def tiny():
    return TADSRPipeline.from_pretrained("tadsr-tiny")


def bands(band_bytes=SMALLEST, limit=None, tick=None):
    return Bands(BandStorage(CPU, device_bytes=limit), band_bytes, tick)


def rows_of(x):
    return ComputedActivation(tuple(x.shape), x.dtype, x.device, lambda a, b: x[:, :, a:b].clone())


def as_whole(activation, bands):
    return None if bands.is_plan else activation.read(0, activation.shape[2])


def encode_in_bands(bands, vae, image, timesteps):
    temb = vae.encoder.embed_timesteps(timesteps, image.dtype)
    return as_whole(walk.encode(BandedLayers(bands, temb), vae, image), bands)


def predict_in_bands(bands, unet, latents, timesteps, prompts, *, attention_side):
    temb = unet.time_embedding(unet.get_time_embed(sample=latents, timestep=timesteps))
    layers = BandedLayers(bands, temb, prompts, attention_side=attention_side)
    return as_whole(walk.predict(layers, unet, rows_of(latents)), bands)


def decode_in_bands(bands, vae, z, emit):
    walk.decode(BandedLayers(bands, emit=emit), vae, rows_of(z))


def decoded(vae, z, bands):
    parts = []
    decode_in_bands(bands, vae, z, lambda start, rows: parts.append((start, rows)))
    starts = [start for start, _ in parts]
    assert starts == sorted(starts)
    return torch.cat([rows for _, rows in parts], dim=2)


@torch.no_grad()
@pytest.mark.parametrize(
    ("band_bytes", "limit"),
    crossed([(SMALLEST, 0), (30_000, None), (2**30, 0)], (SMALLEST, 30_000, 2**30), (None, 0)),
)
def test_the_autoencoder_with_attention_equals_the_whole(golden_pipeline, band_bytes, limit):
    vae = golden_pipeline.vae
    assert vae.config.mid_block_add_attention
    image = torch.rand(2, 3, 72, 56) * 2 - 1
    timesteps = torch.tensor([3, 900])
    whole = vae.encode(image, timesteps).latent_dist.parameters
    found = encode_in_bands(bands(band_bytes, limit), vae, rows_of(image), timesteps)
    assert relative_error(found, whole) < 1e-5
    z = torch.randn_like(whole.chunk(2, dim=1)[0])
    image = decoded(vae, z, bands(band_bytes, limit))
    assert relative_error(image, vae.decode(z).sample) < 1e-5


@torch.no_grad()
def test_what_the_autoencoder_attends_to_counts_as_memory(golden_pipeline, monkeypatch):
    attention = golden_pipeline.vae.encoder.mid_block.attentions[0]
    x = torch.randn(1, attention.query_dim, 40, 30)
    whole, num_bytes = attention(x), x.numel() * x.itemsize

    def attended(storage):
        found = storage.allocate(tuple(x.shape), x.dtype)
        found.begin(with_statistics=True)
        if not isinstance(storage, PlannedStorage):
            found.write(0, x)
        return Bands(storage, SMALLEST).attend_globally(attention, found)

    plan = PlannedStorage(CPU)
    attended(plan)
    assert plan.peak_bytes == 3 * num_bytes  # keys and values beside the input
    results = {}
    for copies in (3, 2, 1, 0):
        storage = BandStorage(CPU, device_bytes=copies * num_bytes)
        results[copies] = attended(storage).read(0, 40)
        assert storage.spilled_bytes == (3 - copies) * num_bytes
        assert relative_error(results[copies], whole) < 1e-5
    # What is in memory is used where it lies.
    monkeypatch.setattr(banded_layers, "attend_to_blocks", None)
    assert attended(BandStorage(CPU, device_bytes=3 * num_bytes)).read(0, 40).equal(results[3])


@torch.no_grad()
@settings(max_examples=12)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 999), st.integers(1, 200_000))
def test_the_shipped_autoencoder_equals_the_whole_at_any_size(tiny, rows, columns, t, band_bytes):
    vae = tiny.vae
    image = torch.rand(1, 3, 4 * rows, 4 * columns) * 2 - 1
    timesteps = torch.tensor([t])
    whole = vae.encode(image, timesteps).latent_dist.mean
    found = encode_in_bands(bands(band_bytes), vae, rows_of(image), timesteps).chunk(2, dim=1)[0]
    assert relative_error(found, whole) < 1e-4
    assert relative_error(decoded(vae, whole, bands(band_bytes)), vae.decode(whole).sample) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "size"),
    crossed(
        [
            *(("tiny", size) for size in UNET_SIZES),
            *(("golden_pipeline", size) for size in ((13, 7), (1, 9))),
            ("unmerged_pipeline", (1, 9)),
        ],
        ("tiny", "golden_pipeline", "unmerged_pipeline"),
        UNET_SIZES,
    ),
)
def test_the_unet_equals_the_whole_at_any_size(request, name, size):
    pipe = request.getfixturevalue(name)
    unet = pipe.unet
    timesteps = torch.tensor([5, 700])
    latents = torch.randn(2, unet.config.in_channels, *size)
    prompts = pipe.encode_prompt(["", ""])
    whole = unet(latents, timesteps, prompts).sample
    for limit in (None, 0):
        found = predict_in_bands(
            bands(limit=limit), unet, latents, timesteps, prompts, attention_side=0
        )
        assert relative_error(found, whole) < 1e-5


@torch.no_grad()
def test_a_window_as_large_as_the_image_changes_nothing_and_a_smaller_one_little(tiny):
    unet, prompts = tiny.unet, tiny.encode_prompt([""])
    latents = torch.randn(1, unet.config.in_channels, 64, 96)
    timesteps = torch.tensor([400])
    found = {
        side: predict_in_bands(bands(2**20), unet, latents, timesteps, prompts, attention_side=side)
        for side in (0, 96, 32)
    }
    assert found[0].equal(found[96])
    assert 0 < relative_error(found[32], found[0]) < 0.05


@torch.no_grad()
def test_the_prompt_is_projected_once_for_all_bands(tiny):
    layer = next(m for name, m in tiny.unet.named_modules() if name.endswith("attn2"))
    projected = []
    hooks = [
        part.register_forward_hook(lambda module, *_: projected.append(module))
        for part in (layer.to_q, layer.to_k, layer.to_v)
    ]
    latents = torch.randn(1, tiny.unet.config.in_channels, 8, 8)
    inputs = latents, torch.tensor([400]), tiny.encode_prompt([""])
    predict_in_bands(bands(), tiny.unet, *inputs, attention_side=0)
    for hook in hooks:
        hook.remove()
    assert projected.count(layer.to_q) > 1
    assert projected.count(layer.to_k) == projected.count(layer.to_v) == 1


@torch.no_grad()
def test_half_precision_is_as_close_as_the_whole(tiny):
    pipe = TADSRPipeline.from_pretrained("tadsr-tiny", torch_dtype=torch.bfloat16)
    image = torch.rand(1, 3, 64, 48) * 2 - 1
    timesteps = torch.tensor([400])
    exact = tiny.vae.encode(image, timesteps).latent_dist.parameters
    image = image.bfloat16()
    whole = pipe.vae.encode(image, timesteps).latent_dist.parameters.float()
    found = encode_in_bands(bands(), pipe.vae, rows_of(image), timesteps).float()
    assert relative_error(found, exact) <= 2 * relative_error(whole, exact)


@torch.no_grad()
def test_a_plan_counts_the_work_that_is_then_done(tiny):
    def run(bands, latents):
        encode_in_bands(bands, tiny.vae, rows_of(image), timesteps)
        predict_in_bands(
            bands, tiny.unet, latents, timesteps, tiny.encode_prompt([""]), attention_side=16
        )
        decode_in_bands(bands, tiny.vae, latents, lambda start, rows: None)

    image, timesteps = torch.zeros(1, 3, 132, 96), torch.tensor([9])
    latents = torch.zeros(1, tiny.unet.config.in_channels, 33, 24)
    planned, done = [], []
    plan = PlannedStorage(CPU)
    run(Bands(plan, 1, planned.append), latents)
    run(bands(100_000, tick=done.append), latents)
    assert sum(planned) == sum(done)
    assert len(done) > len(planned)
    # Two activations of the finest level are alive at once at least, all of it at most.
    finest = 132 * 96 * tiny.vae.config.block_out_channels[0] * 4
    assert 2 * finest <= plan.peak_bytes <= 8 * finest


def test_other_unets_are_refused():
    unet = UNet2DConditionModel(
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=2,
        cross_attention_dim=6,
        attention_head_dim=2,
    )
    with pytest.raises(ValueError, match="SimpleCrossAttn"):
        check_unet(unet)
