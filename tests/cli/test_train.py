"""`tadsr train` from a recipe, from options, and misused."""

import gc
import importlib
import json

import numpy as np
import pytest
import yaml
from PIL import Image

from tadsr.lazily import lasting_imports


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(2):
        pixels = rng.integers(0, 256, (48, 40, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    vae = {
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": [8, 8],
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "mid_block_add_attention": False,
    }
    unet = {
        "sample_size": 8,
        "block_out_channels": [8],
        "down_block_types": ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"],
        "mid_block_type": "UNetMidBlock2D",
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "cross_attention_dim": 4,
    }
    networks = {"vae": vae, "unet": unet, "prompt_embeddings": {"embedding_dim": 4}}
    (tmp_path / "networks.yaml").write_text(yaml.safe_dump(networks))
    recipe = {
        "model": "networks.yaml",
        "data": {"source": "nowhere", "crop_px": 32, "num_workers": 0},
        "output": "elsewhere",
        "stage": {"adapter_rank": 0, "tavsd_weight": 0, "perceptual_weight": 0},
        "steps": 50,
        "device": "cpu",
        "log_every": 1,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def test_a_recipe_is_trained_with_options_over_it(tadsr, files):
    result = tadsr(
        "train", "-c", "recipe.yaml", "--data", "photos", "--output", "runs/mine", "--steps", 2,
        "--set", "stage.blur=false", "--set", "optimizer.learning_rate=1e-4", "--seed", 7,
    )  # fmt: skip
    assert "distillation: 2 photos in photos, 2 steps to runs/mine" in result.output
    assert "trained: runs/mine/model" in result.output
    config = json.loads((files / "runs" / "mine" / "config.json").read_text())
    assert config["stage"]["blur"] is False
    assert config["seed"] == 7
    assert config["optimizer"]["learning_rate"] == 1e-4
    tadsr(
        "upscale",
        "photos/0.png",
        "sharp.png",
        "--model",
        "runs/mine/checkpoints/step_00000002",
        "--scale",
        2,
        "--process-size",
        0,
    )
    with Image.open("sharp.png") as image:
        assert image.size == (80, 96)
    assert (
        "make a model of it" in tadsr("info", "runs/mine/checkpoints/step_00000002", code=1).output
    )


def test_misuse_is_explained(tadsr, files):
    assert "--config FILE, or" in tadsr("train", "--model", "m", code=2).output
    options = ("train", "-c", "recipe.yaml")
    assert "NAME=VALUE" in tadsr(*options, "--set", "steps", code=2).output
    assert "unknown steeps" in tadsr(*options, "--set", "steeps=3", code=1).output
    assert "steps must be int" in tadsr(*options, "--set", "steps=many", code=1).output
    assert (
        "steps must be given a value in YAML" in tadsr(*options, "--set", "steps=[1", code=1).output
    )
    # Options are taken as they are: in YAML this would be a text and a comment.
    assert "got photos #2" in tadsr(*options, "--data", "photos #2", code=1).output
    assert "got nowhere" in tadsr(*options, code=1).output
    assert "Traceback" not in tadsr(*options, code=1).output
    assert not (files / "elsewhere").exists()


def test_a_commands_imports_are_kept_out_of_the_search_for_garbage(tmp_path, monkeypatch):
    (tmp_path / "heavy_module.py").write_text("things = [[] for _ in range(1000)]")
    monkeypatch.syspath_prepend(tmp_path)
    gc.unfreeze()
    with lasting_imports():
        importlib.import_module("heavy_module")
    assert gc.isenabled()
    assert gc.get_freeze_count() > 1000
    gc.unfreeze()
    with lasting_imports():
        pass
    assert gc.get_freeze_count() == 0
