"""Small photographs and small models to train."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from tadsr.training import (
    AutoencoderConfig,
    DataConfig,
    DistillationConfig,
    OptimizerConfig,
    TimestepRamp,
    TrainingConfig,
)
from tadsr.training.stages import from_scratch

PHOTO_PX = 96


def _make_photo(rng: np.random.Generator) -> Image.Image:
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), np.uint8))
    fine = rng.integers(-20, 20, (PHOTO_PX, PHOTO_PX + 16, 3))
    smooth = coarse.resize((PHOTO_PX + 16, PHOTO_PX), Image.Resampling.BICUBIC)
    return Image.fromarray((np.asarray(smooth) + fine).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(4):
        _make_photo(rng).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def official(tmp_path_factory, base_dir, adapter_file):
    """The published layout: base model and adapters in one folder."""
    folder = tmp_path_factory.mktemp("official") / "base"
    shutil.copytree(base_dir, folder)
    shutil.copyfile(adapter_file, folder / "tadsr.pkl")
    return folder


NETWORKS = {
    "vae": {
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": [8, 8],
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "mid_block_add_attention": False,
    },
    "unet": {
        "sample_size": 8,
        "block_out_channels": [8, 8],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "cross_attention_dim": 4,
        "attention_head_dim": 2,
    },
    "prompt_embeddings": {"prompts": ["", "degraded photo"], "embedding_dim": 4},
}


@pytest.fixture(scope="session")
def stable_diffusion(tmp_path_factory, golden_dir):
    """A folder as Stable Diffusion's pipeline writes it, with a plain autoencoder."""
    folder = tmp_path_factory.mktemp("sd") / "base"
    for part in ("text_encoder", "tokenizer", "scheduler"):
        shutil.copytree(golden_dir / "base" / part, folder / part)
    width = json.loads((folder / "text_encoder" / "config.json").read_text())["hidden_size"]
    torch.manual_seed(0)
    AutoencoderKL(**NETWORKS["vae"]).save_pretrained(folder / "vae")
    unet = UNet2DConditionModel(**NETWORKS["unet"] | {"cross_attention_dim": width})
    unet.save_pretrained(folder / "unet")
    index = {"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "AutoencoderKL"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="session")
def networks(tmp_path_factory):
    """Networks of a few thousand parameters, to be built at random weights."""
    path = tmp_path_factory.mktemp("networks") / "networks.yaml"
    path.write_text(yaml.safe_dump(NETWORKS))
    return path


QUICK = OptimizerConfig(learning_rate=2e-3)
PLAIN = AutoencoderConfig(perceptual="none", perceptual_weight=0)


def plain_data(photos, crop_px=32, **changes):
    """Squares of photographs that are only reduced, which costs least."""
    return DataConfig(
        str(photos), crop_px=crop_px, num_workers=0, degradation="bicubic", cache_photos=True,
        **changes,
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def few_crops():
    """Measure the latents' scale, once a run, on fewer crops than a real one needs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(from_scratch, "SCALING_CROPS", 4)
        yield


def make_config(model, photos, output, stage, **changes):
    settings = {
        "data": plain_data(photos),
        "optimizer": QUICK,
        "steps": 3,
        "batch_size": 2,
        "log_every": 1,
        "save_every": 2,
        "device": "cpu",
    }
    return TrainingConfig(model=str(model), output=str(output), stage=stage, **settings | changes)


def distillation(**changes):
    settings = {"perceptual_weight": TimestepRamp(0, 0), "fake_score_optimizer": QUICK}
    return DistillationConfig(**settings | changes)


PLAIN_STUDENT = distillation(adapter_rank=0, tavsd_weight=TimestepRamp(0, 0))
"""Trained whole and without a teacher."""


def read_log(output, kind="steps_per_second"):
    lines = [json.loads(s) for s in (output / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in line]


def trained_tensors(output, network, step):
    return load_file(output / "checkpoints" / f"step_{step:08d}" / f"{network}.safetensors")


@pytest.fixture
def configure(networks, photos, tmp_path):
    """Configure a run on small networks in `tmp_path / "run"`."""
    return lambda stage=PLAIN, **changes: make_config(
        networks, photos, tmp_path / "run", stage, **changes
    )


def take(data, count, **options):
    """Return the first batches of some data, of two samples unless said otherwise."""
    batches = data.batches(**{"batch_size": 2} | options)
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def same(a, b):
    return (
        a.indices.equal(b.indices)
        and a.hq.equal(b.hq)
        and a.lq.equal(b.lq)
        and (a.prompts, a.names) == (b.prompts, b.names)
    )
