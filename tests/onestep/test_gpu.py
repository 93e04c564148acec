"""What only a GPU shows: recorded graphs, half precision, measured choices."""

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from tadsr import TADSRPipeline
from tadsr.onestep import OneStepEngine, choose_plan
from tadsr.onestep.operations import attend_in_chunks

from .conftest import build_networks, make_inputs, relative_error

ROUNDING = 1e-5
"""Between a recorded graph and plain modules in float32: 8e-7 on an H100. An image, timestep,
prompt or weight that is stale below changes a result by 1.3e-3 at least."""
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact_products")]


@pytest.fixture
def on_gpu():
    return [network.cuda() for network in build_networks()]


def to_gpu(inputs, dtype=torch.float32):
    return tuple(x.cuda().to(dtype) if x.is_floating_point() else x.cuda() for x in inputs)


def recording_plan(dtype=torch.float32, **changes):
    """What is chosen, but graphs are recorded when a shape comes the second time."""
    return replace(choose_plan(torch.device("cuda"), dtype), record_after=1, **changes)


def eager_of(engine, inputs):
    networks = (copy.deepcopy(network).float() for network in (engine.vae, engine.unet))
    return OneStepEngine(*networks, engine.alphas_cumprod, "eager").restore(*to_gpu(inputs))


def test_recorded_graphs_take_new_images_timesteps_and_prompts(on_gpu, alphas_cumprod):
    engine = OneStepEngine(*on_gpu, alphas_cumprod, recording_plan())
    for run, timestep in enumerate((500, 500, 1, 999, 500)):
        lq, timesteps, embeds = make_inputs(timesteps=[timestep])
        inputs = to_gpu((lq * (1 - run / 10), timesteps, embeds * (run - 2)))
        assert relative_error(engine.restore(*inputs), eager_of(engine, inputs)) < ROUNDING
        if run == 1:
            graphs = dict(engine.stages.graphs.graphs)
            assert len(graphs) == 3
    assert dict(engine.stages.graphs.graphs) == graphs


def test_graphs_of_several_shapes_do_not_disturb_each_other(on_gpu, alphas_cumprod):
    plan = recording_plan(max_graphs=4)
    engine = OneStepEngine(*on_gpu, alphas_cumprod, plan)
    shapes = [(1, 24, 32), (2, 16, 16), (1, 40, 24)]
    for shape in [*shapes, *shapes, *reversed(shapes), *shapes]:
        inputs = to_gpu(make_inputs(*shape))
        assert relative_error(engine.restore(*inputs), eager_of(engine, inputs)) < ROUNDING
        assert len(engine.stages.graphs.graphs) <= 4


def test_changed_weights_are_recorded_anew(on_gpu, alphas_cumprod):
    engine = OneStepEngine(*on_gpu, alphas_cumprod, recording_plan())
    inputs = to_gpu(make_inputs())
    for factor in (1.0, 1.3, 0.7):
        engine.unet.conv_in.weight.mul_(factor)
        for _ in range(3):
            assert relative_error(engine.restore(*inputs), eager_of(engine, inputs)) < ROUNDING


@pytest.mark.parametrize("color_fix", ["adain", "wavelet", "none"])
def test_bytes_are_on_the_host_once_a_call_returns(color_fix):
    pipe = TADSRPipeline.from_pretrained("tadsr-tiny").to("cuda")
    rng = np.random.default_rng(0)
    options = {"color_fix": color_fix, "timestep": 300}
    for _ in range(3):
        photos = [rng.integers(0, 256, (128, 160, 3), np.uint8) for _ in range(4)]
        found = pipe(photos, **options)
        floats = pipe([photo.astype(np.float32) / 255 for photo in photos], **options)
        for result, wanted in zip(found, floats, strict=True):
            # What two ways of rounding differ by at most.
            assert np.abs(result - wanted * 255).max() < 0.6


def test_threads_share_a_pipeline_on_a_gpu():
    pipe = TADSRPipeline.from_pretrained("tadsr-tiny").to("cuda", torch.float16)
    rng = np.random.default_rng(0)
    photos = [rng.integers(0, 256, (128, 128 + 16 * n, 3), np.uint8) for n in range(4)] * 8
    expected = [pipe(photo) for photo in photos]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(pipe, photos))
    for result, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(result.astype(int), wanted.astype(int), atol=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_close_as_torch(dtype, on_gpu, alphas_cumprod):
    inputs = make_inputs(2, 64, 64)
    networks = [network.to(dtype) for network in on_gpu]
    exact = eager_of(OneStepEngine(*networks, alphas_cumprod), inputs)
    errors = {}
    for choice in ("eager", "fused"):
        engine = OneStepEngine(*networks, alphas_cumprod, choice)
        for _ in range(3):
            result = engine.restore(*to_gpu(inputs, dtype))
        errors[choice] = relative_error(result.float(), exact)
        engine.release()
    assert errors["fused"] < 1.2 * errors["eager"]


def test_an_overflow_in_a_recorded_graph_is_done_again(on_gpu, alphas_cumprod):
    vae, unet = on_gpu
    vae.decoder.conv_in.weight.copy_(vae.decoder.conv_in.weight.sign() * 6e4)
    vae.decoder.conv_in.bias.fill_(6e4)
    plan = recording_plan(torch.float16)
    engine = OneStepEngine(vae.half(), unet.half(), alphas_cumprod, plan)
    inputs = make_inputs()
    exact = eager_of(engine, inputs)
    with pytest.warns(UserWarning, match="decoder overflowed"):
        results = [engine.restore(*to_gpu(inputs, torch.float16)) for _ in range(4)]
    for result in results:
        assert (result - exact).abs().mean() < 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_wide_heads_with_large_scores(dtype):
    query, key, value = (3 * torch.randn(3, 1, 1, 300, 512, device="cuda")).to(dtype).unbind()
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), scale=0.1
    )
    result = attend_in_chunks(query, key, value, 0.1)
    assert relative_error(result, expected) < (2e-3 if dtype == torch.float16 else 1e-5)
