"""Products in bfloat16 inside, everything between them in float32; and who chooses them."""

import math

import pytest
import torch

from tadsr import TADSRPipeline
from tadsr.machine import machine_key, remember
from tadsr.onestep import EnginePlan, OneStepEngine, products
from tadsr.onestep.products import choose_products, exact_layers
from tadsr.quick import open_quickly

from .conftest import build_networks, make_inputs

CPU = torch.device("cpu")
MIXED = EnginePlan(multiplied=torch.bfloat16)


def psnr(found, expected):
    return 10 * math.log10(4 / (found - expected).square().mean().item())


@torch.no_grad()
def images(networks, alphas_cumprod, inputs, *plans):
    return [OneStepEngine(*networks, alphas_cumprod, plan).restore(*inputs) for plan in plans]


@pytest.mark.parametrize("options", [{}, {"use_linear_projection": False}], ids=["linear", "conv"])
def test_every_layer_takes_products_in_bfloat16(options, alphas_cumprod):
    networks, inputs = build_networks(**options), make_inputs(2, 20, 24, [7, 800])
    plans = EnginePlan(), MIXED, EnginePlan(channels_last=False, multiplied=torch.bfloat16)
    exact, mixed, contiguous = images(networks, alphas_cumprod, inputs, *plans)
    assert mixed.dtype == torch.float32
    assert not torch.equal(mixed, exact)
    assert psnr(mixed, exact) > 40
    assert psnr(contiguous, exact) > 40


def test_what_all_features_pass_is_multiplied_in_the_weights_type():
    vae, unet = build_networks()
    exact = exact_layers(vae, unet)
    assert {vae.encoder.conv_in, vae.decoder.conv_out, vae.quant_conv, unet.conv_in} < exact
    assert {unet.down_blocks[0].resnets[0].conv1, unet.down_blocks[0].attentions[0].proj_in} < exact
    assert {
        unet.up_blocks[1].resnets[0].conv_shortcut,
        unet.up_blocks[1].attentions[0].proj_out,
    } < exact
    first = vae.encoder.down_blocks[0]
    assert {first.resnets[0].conv1, first.resnets[0].conv2, first.downsamplers[0].conv} < exact
    assert vae.encoder.down_blocks[1].resnets[0].conv1 not in exact
    assert not {unet.up_blocks[0].resnets[0].conv1, unet.mid_block.resnets[0].conv1} & exact
    assert not {vae.decoder.up_blocks[0].resnets[0].conv2, vae.encoder.mid_block.resnets[0]} & exact


def test_the_embedded_model_keeps_50_db():
    model = open_quickly("tadsr-tiny", torch.float32, "fused")
    inputs = make_inputs(1, 48, 64)[0], [200], model.encode_prompt([""])
    networks = model.vae, model.unet
    exact, mixed = images(networks, model.alphas_cumprod, inputs, EnginePlan(), MIXED)
    assert psnr(mixed, exact) > 50


@pytest.mark.parametrize(
    ("flags", "share", "expected"),
    [
        ({"amx_bf16"}, 0.3, torch.bfloat16),
        ({"avx512_bf16"}, 1.2, None),
        (set(), 0.3, None),
    ],
    ids=["fast", "slower all the same", "no instructions"],
)
def test_auto_is_what_was_measured(flags, share, expected, monkeypatch, tmp_path, model_dir):
    monkeypatch.setenv("TADSR_CACHE", str(tmp_path))
    monkeypatch.setattr(products, "cpu_instructions", lambda: frozenset(flags))
    remember("bfloat16", machine_key(CPU, torch.bfloat16), share)
    assert choose_products(CPU, torch.float32).multiplied == expected
    assert choose_products(CPU, torch.float16).multiplied is None
    pipe = TADSRPipeline.from_pretrained(model_dir, torch_dtype="auto")
    with torch.no_grad():
        assert pipe.unet.dtype == torch.float32
        assert pipe.engine.stages.plan.multiplied == expected
        pipe.set_engine("fused")
        assert pipe.engine.stages.plan.multiplied == expected
        assert TADSRPipeline.from_pretrained(model_dir).engine.stages.plan.multiplied is None
        assert pipe.to(torch.float32).engine.stages.plan.multiplied is None


def test_what_is_measured_first_is_remembered(monkeypatch, tmp_path):
    monkeypatch.setenv("TADSR_CACHE", str(tmp_path))
    monkeypatch.setattr(products, "cpu_instructions", lambda: frozenset({"avx512_bf16"}))
    monkeypatch.setattr(products, "_REPETITIONS", 1)
    monkeypatch.setattr(products, "_SIDE", 8)
    first = choose_products(CPU, torch.float32)
    assert "takes" in first.reason
    assert choose_products(CPU, torch.float32) == first
