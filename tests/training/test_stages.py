"""The stages run, learn, resume and leave alone what they must not touch."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file

from tadsr import TADSRError
from tadsr.models.prompt_embeddings import PromptEmbeddings
from tadsr.models.time_aware_vae import TimeAwareAutoencoderKL
from tadsr.schedule import make_alphas_cumprod
from tadsr.training.config import (
    AutoencoderConfig,
    DataConfig,
    OptimizerConfig,
    RunConfig,
    StudentConfig,
    TimestepRamp,
)
from tadsr.training.data import DegradedCrops, crop_photo, load_photos
from tadsr.training.losses import mse_per_sample
from tadsr.training.perceptual import SqueezeNetDistance
from tadsr.training.recipe import config_from_mapping
from tadsr.training.stages import measure_scaling_factor, train_autoencoder, train_student


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(3):
        coarse = rng.integers(0, 256, (6, 8, 3), np.uint8)
        Image.fromarray(coarse).resize((80, 60), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff not a picture")
    Image.new("RGB", (8, 8)).save(folder / "small.png")
    return folder


def models():
    torch.manual_seed(0)
    vae = TimeAwareAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=2,
        mid_block_add_attention=False,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type="UNetMidBlock2D",
        layers_per_block=1,
        norm_num_groups=2,
        cross_attention_dim=4,
    )
    return vae, unet, PromptEmbeddings(embedding_dim=4)


def settings(photos, output, steps, **run):
    return {
        "run": RunConfig(str(output), steps, 2, log_every=1, save_every=2, ema_decay=0.5, **run),
        "data": DataConfig(str(photos), crop_px=24, num_workers=0),
        "optimizer": OptimizerConfig(learning_rate=3e-3, warmup_steps=1),
    }


def losses(output):
    return [json.loads(s)["loss"] for s in (output / "log.jsonl").read_text().splitlines()]


def test_the_autoencoder_learns_and_leaves_time_alone(photos, tmp_path):
    vae, _, _ = models()
    config = AutoencoderConfig(**settings(photos, tmp_path, 40), perceptual_weight=0.0)
    train_autoencoder(vae, config, mse_per_sample)
    history = losses(tmp_path)
    assert len(history) == 40
    assert np.mean(history[-8:]) < 0.8 * np.mean(history[:8])
    x = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(vae(x, 1), vae(x, 999))
    hq = torch.rand(2, 3, 16, 16) * 2 - 1
    factor = measure_scaling_factor(vae, hq)
    assert (vae.encode(hq, 0).latent_dist.mode() * factor).std().item() == pytest.approx(
        1, rel=1e-3
    )


def student_config(photos, output, steps, **changes):
    return StudentConfig(
        **settings(photos, output, steps),
        latent_steps=2,
        mse_weight=TimestepRamp(1, 0),
        perceptual_weight=TimestepRamp(0, 0.1),
        **changes,
    )


def test_the_student_trains_encoder_and_unet_but_not_the_decoder(photos, tmp_path):
    vae, unet, prompts = models()
    before = {k: v.clone() for k, v in vae.state_dict().items()}
    alphas = make_alphas_cumprod()
    train_student(vae, unet, prompts, alphas, student_config(photos, tmp_path, 5), mse_per_sample)
    changed = {k for k, v in vae.state_dict().items() if not v.equal(before[k])}
    assert any("time_emb_proj" in k for k in changed)
    assert any("encoder.conv_in" in k for k in changed)
    assert not any(k.startswith(("decoder", "post_quant")) for k in changed)

    config = student_config(photos, tmp_path / "joint", 5, train_decoder=True)
    train_student(vae, unet, prompts, alphas, config, mse_per_sample)
    assert not vae.decoder.conv_out.weight.equal(before["decoder.conv_out.weight"])


def logged(output):
    return json.loads((output / "log.jsonl").read_text().splitlines()[-1])


def test_every_weight_of_the_autoencoder_counts(photos, tmp_path):
    weights = {"l1": 0.7, "perceptual": 0.3, "chroma": 2.0, "kl": 1e-3}
    config = AutoencoderConfig(
        **settings(photos, tmp_path, 1), **{f"{k}_weight": v for k, v in weights.items()}
    )
    train_autoencoder(models()[0], config, mse_per_sample)
    line = logged(tmp_path)
    assert all(line[name] * weight > 1e-3 for name, weight in weights.items())
    expect = sum(line[name] * weight for name, weight in weights.items())
    assert line["loss"] == pytest.approx(expect, abs=1e-4)


def test_every_weight_of_the_student_counts(photos, tmp_path):
    weights = {"mse": 0.7, "blurred_mse": 1.3, "chroma_mse": 2.0, "perceptual": 0.3}
    ramps = {f"{k}_weight": TimestepRamp(v, v) for k, v in weights.items()}
    config = StudentConfig(**settings(photos, tmp_path, 1), **ramps)
    train_student(*models(), make_alphas_cumprod(), config, mse_per_sample)
    line = logged(tmp_path)
    assert all(line[name] * weight > 1e-3 for name, weight in weights.items())
    expect = sum(line[name] * weight for name, weight in weights.items())
    assert line["loss"] == pytest.approx(expect, rel=1e-4, abs=1e-4)


def test_an_interrupted_run_continues_where_it_stopped(photos, tmp_path):
    alphas = make_alphas_cumprod()
    vae, unet, prompts = models()
    first = student_config(photos, tmp_path, 4)
    train_student(vae, unet, prompts, alphas, first, mse_per_sample)
    vae, unet, prompts = models()
    longer = dataclasses.replace(first, run=dataclasses.replace(first.run, total_steps=6))
    train_student(vae, unet, prompts, alphas, longer, mse_per_sample)
    assert len(losses(tmp_path)) == 6
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["step"] == 6

    other = TimeAwareAutoencoderKL(**dict(vae.config) | {"layers_per_block": 2})
    with pytest.raises(TADSRError, match="another output folder"):
        train_student(other, unet, prompts, alphas, longer, mse_per_sample)


def test_a_loss_that_is_not_finite_stops_the_run(photos, tmp_path):
    vae, unet, prompts = models()
    with torch.no_grad():
        unet.conv_out.bias.fill_(float("inf"))
    config = student_config(photos, tmp_path, 2)
    with pytest.raises(FloatingPointError, match="must be finite"):
        train_student(vae, unet, prompts, make_alphas_cumprod(), config, mse_per_sample)


def test_photos_that_cannot_be_used_are_skipped(photos, tmp_path):
    assert len(load_photos(photos, 24)) == 3
    with pytest.raises(ValueError, match="got none"):
        load_photos(tmp_path, 24)


def test_crops_are_reproducible_pairs_of_one_size(photos):
    config = DataConfig(str(photos), crop_px=24, num_workers=0)
    arrays = load_photos(photos, 24)
    draws = [next(iter(DegradedCrops(arrays, config, seed=s))) for s in (0, 0, 1)]
    for hq, lq in draws:
        assert hq.shape == lq.shape == (3, 24, 24)
        assert hq.abs().max() <= 1
        assert lq.abs().max() <= 1
    assert draws[0][0].equal(draws[1][0])
    assert draws[0][1].equal(draws[1][1])
    assert not draws[0][0].equal(draws[2][0])


def test_a_crop_without_zoom_is_a_piece_of_the_photo():
    photo = np.arange(30 * 40 * 3, dtype=np.uint8).reshape(30, 40, 3)
    crop = crop_photo(photo, 16, 1.0, np.random.default_rng(3))
    pixels = ((crop + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    variants = [pixels, pixels[::-1], pixels[:, ::-1], pixels[::-1, ::-1]]
    variants += [v.transpose(1, 0, 2) for v in variants]
    windows = np.lib.stride_tricks.sliding_window_view(photo, (16, 16, 3)).reshape(-1, 16, 16, 3)
    assert any((windows == v).all((1, 2, 3)).any() for v in variants)


def test_squeezenet_distance(tmp_path):
    from tadsr.training.perceptual import _FIRE

    torch.manual_seed(0)
    tensors = {"conv1.weight": torch.randn(96, 3, 7, 7) * 0.01, "conv1.bias": torch.zeros(96)}
    for name, (width, squeeze, expand) in _FIRE.items():
        for part, shape in (
            ("squeeze", (squeeze, width, 1, 1)),
            ("expand1x1", (expand, squeeze, 1, 1)),
            ("expand3x3", (expand, squeeze, 3, 3)),
        ):
            tensors[f"{name}.{part}.weight"] = torch.randn(shape) * 0.1
            tensors[f"{name}.{part}.bias"] = torch.zeros(shape[0])
    save_file(tensors, tmp_path / "net.safetensors")
    distance = SqueezeNetDistance(tmp_path / "net.safetensors")
    image = torch.rand(2, 3, 48, 64) * 2 - 1
    noisy = (image + 0.3 * torch.randn_like(image)).requires_grad_()
    assert distance(image, image).tolist() == [0, 0]
    values = distance(noisy, image)
    assert values.shape == (2,)
    assert (values > 0).all()
    values.sum().backward()
    assert noisy.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in distance.parameters())
    del tensors["fire5.squeeze.bias"]
    save_file(tensors, tmp_path / "less.safetensors")
    with pytest.raises(TADSRError, match=r"fire5\.squeeze\.bias"):
        SqueezeNetDistance(tmp_path / "less.safetensors")


def test_recipes_are_checked():
    mapping = {"output": "x", "total_steps": 3, "batch_size": 2}
    assert config_from_mapping(RunConfig, mapping) == RunConfig("x", 3, 2)
    with pytest.raises(ValueError, match="unknown"):
        config_from_mapping(RunConfig, mapping | {"total_step": 3})
    with pytest.raises(ValueError, match="bf16"):
        config_from_mapping(RunConfig, mapping | {"precision": "fp16"})


@pytest.mark.parametrize(
    "make",
    [
        lambda: TimestepRamp(-1, 0),
        lambda: AutoencoderConfig(RunConfig("x", 1, 1), DataConfig("x"), chroma_weight=-1.0),
        lambda: StudentConfig(RunConfig("x", 1, 1), DataConfig("x"), latent_steps=-1),
        lambda: DataConfig("x", crop_px=12),
        lambda: DataConfig("x", min_zoom=0),
        lambda: OptimizerConfig(learning_rate=0),
        lambda: OptimizerConfig(final_fraction=2),
        lambda: RunConfig("x", 0, 1),
        lambda: RunConfig("x", 1, 1, ema_decay=1.0),
    ],
)
def test_configurations_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match="must be"):
        make()
