"""Whatever the switches, the engine's result is that of diffusers' modules."""

import pytest
import torch

from tadsr import TADSRPipeline
from tadsr.onestep import EnginePlan, OneStepEngine
from tests.crossings import crossed

from .conftest import build_networks, make_inputs, relative_error

MAX_ERROR = 1e-5
PLANS = {
    "cpu": EnginePlan(),
    "contiguous": EnginePlan(channels_last=False),
    "enlarged": EnginePlan(upsampling="enlarged"),
    "kernels": EnginePlan(fused_kernels=True, upsampling="measured"),
    "kernels, contiguous": EnginePlan(fused_kernels=True, channels_last=False),
}


OTHER_PLANS = crossed([("cpu",), ("contiguous",), ("kernels",)], PLANS)
"""For networks beside the usual ones, whose upsampling is theirs."""


@pytest.fixture(params=PLANS, ids=str)
def plan(request):
    return PLANS[request.param]


@torch.no_grad()
def compare(networks, alphas_cumprod, plan, inputs, seed=None):
    def restore(choice):
        engine = OneStepEngine(*networks, alphas_cumprod, choice)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        result = engine.restore(*inputs, generator=generator)
        engine.release()
        return result

    expected = restore("eager")
    # Not all clamped to white and black, which would be equal too easily.
    assert (expected.abs() < 1).float().mean() > 0.2
    assert relative_error(restore(plan), expected) < MAX_ERROR


@pytest.mark.parametrize(
    ("batch", "height", "width", "timesteps"),
    [(1, 24, 32, [500]), (2, 16, 16, [300, 300]), (3, 20, 12, [0, 999, 17])],
    ids=["one", "batch", "odd latents and timesteps of their own"],
)
def test_the_result_is_that_of_plain_modules(
    batch, height, width, timesteps, plan, networks, alphas_cumprod
):
    compare(networks, alphas_cumprod, plan, make_inputs(batch, height, width, timesteps))


def test_sampling_draws_the_same_noise(plan, networks, alphas_cumprod):
    compare(networks, alphas_cumprod, plan, make_inputs(2), seed=3)


@pytest.mark.parametrize(
    "options",
    [
        {"use_linear_projection": False},
        {"resnet_time_scale_shift": "scale_shift"},
        {"mid_block_type": None},
        {"transformer_layers_per_block": 2},
        {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("plan", OTHER_PLANS, indirect=True)
def test_other_unets_of_the_same_blocks(options, plan, alphas_cumprod):
    networks = build_networks(**options)
    compare(networks, alphas_cumprod, plan, make_inputs(2, timesteps=[5, 900]))


def test_one_prompt_for_a_batch_may_be_a_view(plan, networks, alphas_cumprod):
    lq, timesteps, embeds = make_inputs(2)
    compare(networks, alphas_cumprod, plan, (lq, timesteps, embeds[:1].expand(2, -1, -1)))


@pytest.fixture(scope="module")
def golden_engine_pipeline(golden_dir):
    # By kernels; what a CPU takes by itself is held to them in tests/parity.
    pipe = TADSRPipeline.from_pretrained(golden_dir / "base", adapter=golden_dir / "tadsr.pkl")
    pipe.set_engine(PLANS["kernels"])
    return pipe


@pytest.mark.parametrize("case", range(5))
@torch.no_grad()
def test_published_figures(case, golden_engine_pipeline, golden, golden_cases):
    pipe = golden_engine_pipeline
    _, _, timestep, prompt = golden_cases[case]
    arguments = (golden[f"{case}.lq"], torch.tensor([timestep]), pipe.encode_prompt([prompt]))
    expected = golden[f"{case}.mode.image"]
    torch.testing.assert_close(pipe.restore(*arguments), expected, atol=2e-4, rtol=0)


def test_the_small_model_of_the_package():
    pipe = TADSRPipeline.from_pretrained("tadsr-tiny", engine="eager")
    lq = torch.rand(1, 3, 100, 140, generator=torch.Generator().manual_seed(0))
    expected = pipe(lq, 300, scale=1, process_size=0)
    for plan in (PLANS["cpu"], PLANS["kernels"]):
        pipe.set_engine(plan)
        error = relative_error(pipe(lq, 300, scale=1, process_size=0), expected)
        assert error < MAX_ERROR
