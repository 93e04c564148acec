"""Timesteps, prompts, weights and modules change; overflow; models that the engine cannot run."""

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from tadsr import TADSRError, TADSRPipeline
from tadsr.networks.adapters import attach_new_adapters, has_adapters
from tadsr.onestep import EnginePlan, OneStepEngine
from tadsr.onestep.stages import (
    MAX_PROMPTS,
    MAX_TIMESTEPS,
    CompiledStages,
    EagerStages,
    FusedStages,
    PromptFolding,
    TimeFolding,
)
from tadsr.prompts import Prompts

from .conftest import build_networks, make_inputs, relative_error

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def engine(networks, alphas_cumprod):
    return OneStepEngine(*networks, alphas_cumprod)


def expected_of(engine, inputs):
    eager = OneStepEngine(
        copy.deepcopy(engine.vae), copy.deepcopy(engine.unet), engine.alphas_cumprod, "eager"
    )
    return eager.restore(*inputs)


def test_each_timestep_and_prompt_gets_its_own_result(engine):
    lq, _, embeds = make_inputs()
    for timestep in (1, 999, 1):
        for prompt in (embeds, -embeds, embeds):
            inputs = (lq, torch.tensor([timestep]), prompt)
            assert relative_error(engine.restore(*inputs), expected_of(engine, inputs)) < 1e-5


def test_a_prompt_is_known_by_its_content(engine):
    lq, timesteps, embeds = make_inputs()
    before = engine.restore(lq, timesteps, embeds)
    embeds.mul_(-3)  # the same tensor at the same address
    after = engine.restore(lq, timesteps, embeds)
    assert relative_error(after, before) > 1e-4
    assert relative_error(after, expected_of(engine, (lq, timesteps, embeds))) < 1e-5


def test_what_is_kept_of_timesteps_and_prompts_is_bounded(networks):
    vae, unet = networks
    folding = TimeFolding(vae.encoder)
    first = folding.of([0])
    assert folding.of([0, 0]) is first
    for timestep in range(2 * MAX_TIMESTEPS):
        folding.of([timestep])
    assert len(folding._rows) == MAX_TIMESTEPS
    assert folding.of([0]) is not first
    torch.testing.assert_close(folding.of([0]), first, atol=0, rtol=0)

    prompts = PromptFolding(unet)
    one = Prompts(torch.ones(2, 5, 6), ("", ""))
    assert prompts.of(one) is prompts.of(one[:1])
    for number in range(2 * MAX_PROMPTS):
        prompts.of(Prompts(torch.full((1, 5, 6), float(number)), (number,)))
    assert len(prompts._entries) == MAX_PROMPTS
    alone = torch.ones(1, 5, 6)
    assert prompts.of(Prompts(alone)) is prompts.of(Prompts(alone))


CHANGES = {
    "in place": lambda engine: engine.vae.decoder.conv_in.bias.add_(1),
    "another tensor": lambda engine: setattr(
        engine.unet.conv_in.weight, "data", engine.unet.conv_in.weight * 2
    ),
    "another parameter": lambda engine: setattr(
        engine.unet.conv_in, "weight", nn.Parameter(engine.unet.conv_in.weight * 2)
    ),
    "loaded": lambda engine: engine.unet.load_state_dict(
        {name: values * 1.1 for name, values in engine.unet.state_dict().items()}
    ),
    "another module": lambda engine: setattr(
        engine.vae.decoder, "conv_out", copy.deepcopy(engine.vae.decoder.conv_out).requires_grad_()
    ),
    "cast": lambda engine: (engine.vae.double(), engine.unet.double()),
    "processor": lambda engine: engine.unet.set_attn_processor(AttnProcessor()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(change, engine):
    inputs = make_inputs()
    engine.restore(*inputs)
    stages = engine.stages
    assert engine.stages is stages
    CHANGES[change](engine)
    inputs = tuple(x.to(engine.unet.dtype) if x.is_floating_point() else x for x in inputs)
    assert relative_error(engine.restore(*inputs), expected_of(engine, inputs)) < 1e-5
    assert engine.stages is not stages


def test_attached_adapters_are_computed_by_plain_modules(engine):
    inputs = make_inputs()
    before = engine.restore(*inputs)
    attach_new_adapters(engine.unet, None, rank=2)
    for name, values in engine.unet.named_parameters():
        if "lora_B" in name:
            values.normal_()
    assert has_adapters(engine.unet)
    after = engine.restore(*inputs)
    assert isinstance(engine.stages, EagerStages)
    assert relative_error(after, before) > 1e-3
    assert relative_error(after, expected_of(engine, inputs)) < 1e-6


def test_a_hook_is_obeyed(engine):
    inputs = make_inputs()
    engine.restore(*inputs)
    calls = []
    handle = engine.unet.mid_block.register_forward_hook(lambda *_: calls.append(1))
    engine.restore(*inputs)
    assert calls == [1]
    handle.remove()
    engine.restore(*inputs)
    assert calls == [1]
    assert isinstance(engine.stages, FusedStages)


def test_gradients_flow_through_plain_modules(engine):
    lq, timesteps, embeds = make_inputs()
    with torch.enable_grad():
        engine.unet.conv_in.weight.requires_grad_(True)
        latents = engine.encode(lq, timesteps)
        engine.predict_x0(latents, timesteps, embeds).sum().backward()
    assert engine.unet.conv_in.weight.grad.abs().sum() > 0


def test_the_layout_of_weights_is_given_back(engine):
    before = {name: values.clone() for name, values in engine.unet.state_dict().items()}
    engine.restore(*make_inputs())
    weight = engine.unet.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    engine.release()
    assert engine.unet.conv_in.weight.is_contiguous()
    for name, values in engine.unet.state_dict().items():
        assert torch.equal(values, before[name])


@pytest.mark.parametrize("choice", ["fused", "auto"])
def test_unknown_blocks_run_as_they_are_with_one_warning(choice, alphas_cumprod):
    vae, _ = build_networks()
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "CrossAttnUpBlock2D"),
    }
    unet = UNet2DConditionModel.from_config(
        {**build_networks()[1].config, **blocks}
    ).requires_grad_(False)
    engine = OneStepEngine(vae, unet, alphas_cumprod, choice)
    with pytest.warns(UserWarning, match="the UNet has other blocks") as caught:
        result, _ = (engine.restore(*make_inputs()) for _ in range(2))
    assert len(caught) == 1
    assert torch.equal(result, expected_of(engine, make_inputs()))


@pytest.mark.parametrize("stage", ["encoder", "UNet", "decoder"])
def test_a_stage_that_overflows_halves_is_done_again(stage, networks, alphas_cumprod):
    vae, unet = networks
    part = {"encoder": vae.encoder, "UNet": unet, "decoder": vae.decoder}[stage]
    # More than a half can hold, up to the last normalisation.
    part.conv_in.weight.copy_(part.conv_in.weight.sign() * 6e4)
    part.conv_in.bias.fill_(6e4)
    vae.half(), unet.half()

    exact = OneStepEngine(
        copy.deepcopy(vae).float(), copy.deepcopy(unet).float(), alphas_cumprod, "eager"
    ).restore(*make_inputs())
    inputs = make_inputs(dtype=torch.float16)
    with pytest.raises(TADSRError, match="finite"):
        OneStepEngine(vae, unet, alphas_cumprod, "eager").restore(*inputs)
    engine = OneStepEngine(vae, unet, alphas_cumprod)
    with pytest.warns(UserWarning, match=f"{stage} overflowed torch.float16") as caught:
        result, _ = (engine.restore(*inputs) for _ in range(2))
    assert len(caught) == 1
    assert (result - exact).abs().mean() < 0.01


def test_what_is_not_finite_in_any_type_is_an_error(networks, alphas_cumprod):
    vae, unet = networks
    unet.conv_out.bias.fill_(float("nan"))
    for dtype in (torch.float32, torch.float16):
        engine = OneStepEngine(vae.to(dtype), unet.to(dtype), alphas_cumprod)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            with pytest.raises(TADSRError, match="finite"):
                engine.restore(*make_inputs(dtype=dtype))


def test_finish_sees_the_clamped_images(engine):
    inputs = make_inputs()
    seen = engine.restore(*inputs, finish=lambda image: image + 10)
    torch.testing.assert_close(seen - 10, engine.restore(*inputs), atol=1e-5, rtol=0)


def test_a_pipeline_chooses_its_engine(golden_dir):
    pipe = TADSRPipeline.from_pretrained(
        golden_dir / "base", adapter=golden_dir / "tadsr.pkl", engine="eager"
    )
    assert isinstance(pipe.engine.stages, EagerStages)
    pipe.set_engine("fused")
    assert isinstance(pipe.engine.stages, FusedStages)
    pipe.set_engine("compile")
    assert isinstance(pipe.engine.stages, CompiledStages)
    pipe.set_engine(EnginePlan(upsampling="enlarged"))
    assert pipe.engine.stages.plan.upsampling == "enlarged"
    with pytest.raises(ValueError, match="engine must be one of auto, fused, eager, compile"):
        pipe.set_engine("fast")
    assert pipe.engine.stages.plan.upsampling == "enlarged"
    other = copy.deepcopy(pipe.unet)
    pipe.unet = other
    assert pipe.engine.unet is other
    assert isinstance(pipe.engine.stages, FusedStages)


def test_compiled_networks_run_in_any_thread(model_dir, monkeypatch):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    # Traced by torch, and run without inductor, which would compile C++ for a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    latents = torch.randn(1, 4, 4, 4)
    results = {}
    for engine in ("eager", "compile"):
        pipe = TADSRPipeline.from_pretrained(model_dir, engine=engine)
        decode = torch.no_grad()(pipe.decode_latents)
        with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
            found = first.submit(decode, latents).result()
            num_graphs = len(graphs)
            results[engine] = [found, second.submit(decode, latents).result(), decode(latents)]
        # What one thread compiled serves the others.
        assert len(graphs) == num_graphs
        assert bool(graphs) == (engine == "compile")
    for found in results["compile"]:
        torch.testing.assert_close(found, results["eager"][0], atol=1e-5, rtol=0)


def test_a_model_that_was_run_is_saved_as_it_was(own_pipeline, tmp_path):
    pipe = own_pipeline
    expected = {name: values.clone() for name, values in pipe.unet.state_dict().items()}
    pipe(torch.rand(3, 8, 8), process_size=0)
    pipe.save_pretrained(tmp_path / "model")
    again = TADSRPipeline.from_pretrained(tmp_path / "model").unet.state_dict()
    for name, values in expected.items():
        assert torch.equal(again[name], values)
