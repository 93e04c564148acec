"""Bare layers are diffusers' modules without their code: the same facts and the same result."""

import json
import shutil

import pytest
import torch
from torch import nn

from tadsr import TADSRPipeline, TileSpec
from tadsr.checkpoints.quick import load_bare
from tadsr.cli.model import describe
from tadsr.networks.bare import Bare, build_bare, has_known_blocks
from tadsr.quick import open_quickly
from tadsr.schedule import make_alphas_cumprod
from tests.onestep.conftest import build_networks

FACTS = {
    nn.Conv2d: ("stride", "padding", "kernel_size"),
    nn.GroupNorm: ("num_groups", "eps"),
    nn.LayerNorm: ("eps",),
    nn.Linear: ("in_features",),
}
NAMED_FACTS = {
    "Attention": (
        *("heads", "scale", "inner_dim", "inner_kv_dim", "is_cross_attention"),
        *("rescale_output_factor", "residual_connection"),
    ),
    "ResnetBlock2D": ("out_channels", "skip_time_act"),
}


def facts_of(network):
    found = {}
    for name, module in network.named_modules():
        kind = type(module)
        names = FACTS.get(kind) or NAMED_FACTS.get(kind.__name__, ())
        found.update({(name, fact): getattr(module, fact) for fact in names})
        if kind.__name__ == "ResnetBlock2D":
            found[name, "is modulated"] = module.time_embedding_norm == "scale_shift"
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_linear_projection": False, "attention_head_dim": [2, 4]},
        {
            "block_out_channels": (8, 8, 16),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
            "attention_head_dim": [2, 4, 8],
            "layers_per_block": 2,
        },
    ],
    ids=["small", "heads by level", "three levels"],
)
def test_bare_layers_have_the_facts_of_diffusers(options):
    for name, network in zip(("vae", "unet"), build_networks(**options), strict=True):
        config = json.loads(network.to_json_string())
        shapes = {tensor: tuple(p.shape) for tensor, p in network.state_dict().items()}
        bare = build_bare(name, config, shapes)
        assert {n: tuple(p.shape) for n, p in bare.state_dict().items()} == shapes
        expected = facts_of(network)
        assert expected
        assert {key: facts_of(bare)[key] for key in expected} == expected


@pytest.mark.parametrize(
    "change",
    [
        {"resnet_time_scale_shift": "scale_shift"},
        {"addition_embed_type": "text"},
        {"attention_head_dim": None},
        {"down_block_types": ["AttnDownBlock2D"]},
        {"act_fn": "gelu"},
    ],
    ids=str,
)
def test_other_networks_are_not_taken_for_known(change):
    vae, unet = (json.loads(network.to_json_string()) for network in build_networks())
    assert has_known_blocks(unet, vae)
    assert not has_known_blocks(unet | change, vae)


def test_a_quick_restorer_gives_the_pipelines_bytes(model_dir):
    image = torch.rand(3, 24, 20, generator=torch.Generator().manual_seed(0))
    quick = open_quickly(str(model_dir), torch.float32, "auto")
    pipe = TADSRPipeline.from_pretrained(model_dir)
    for options in ({"timestep": 7}, {"timestep": [999]}, {"timestep": 300, "scale": 2.5}):
        options |= {"process_size": 0}
        assert torch.equal(quick(image, **options), pipe(image, **options))
    assert quick.engine.grow is not None
    # In pieces layers must compute by themselves.
    pieces = {"tiling": TileSpec(), "process_size": 0}
    # Their weights lie in another order by now.
    assert torch.allclose(quick(image, **pieces), pipe(image, **pieces), atol=1e-5)
    assert quick.engine.grow is None
    quick.set_engine("eager")
    pipe.set_engine("eager")
    assert torch.allclose(quick(image, process_size=0), pipe(image, process_size=0), atol=1e-5)


def test_saying_why_changes_nothing_of_what_runs(model_dir):
    quick = open_quickly(str(model_dir), torch.float32, "auto", mixes=True)
    assert torch.is_grad_enabled()
    assert "engine: asked for auto" in describe(quick, reasons=True)
    assert isinstance(quick.unet, Bare)


def test_the_embedded_model_loads_bare_and_odd_folders_do_not(golden_dir, model_dir, tmp_path):
    bare = load_bare("tadsr-tiny", torch.float32)
    assert torch.equal(bare.alphas_cumprod, make_alphas_cumprod())
    with pytest.raises(ValueError, match="prompt must be left out"):
        bare.prompt_embeddings(["a cat"])
    assert load_bare(golden_dir / "base", torch.float32) is None
    assert load_bare("owner/name", torch.float32) is None
    for file in model_dir.rglob("*"):
        if file.is_file():
            copy = tmp_path / file.relative_to(model_dir)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes()[: -8 if file.suffix == ".safetensors" else None])
    assert load_bare(tmp_path, torch.float32) is None


@pytest.mark.parametrize(
    "change", [{"num_train_timesteps": 10**9}, {"trained_betas": [0.1] * 1000}, {"beta_end": None}]
)
def test_schedules_are_left_to_the_full_way_unless_they_are_plain(model_dir, tmp_path, change):
    model = shutil.copytree(model_dir, tmp_path / "model")
    path = model / "scheduler" / "scheduler_config.json"
    assert load_bare(model, torch.float32) is not None
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert load_bare(model, torch.float32) is None
