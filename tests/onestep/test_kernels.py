"""The engine with real kernels: interpreted by tests/kernels/test_interpreted.py, or on a GPU."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from tadsr import TADSRPipeline
from tadsr.onestep import EnginePlan, OneStepEngine

from .conftest import build_networks, make_inputs, relative_error

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [pytest.mark.usefixtures("exact_products")]
pytestmark += [] if IS_INTERPRETED else [pytest.mark.gpu]
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
KERNELS = {f"{name}_kernel" for name in ("whole_group", "measure", "apply", "geglu")}
ENDS = {"adain": "adain_kernel", "wavelet": "wavelet_level_kernel", "none": "to_uint8_kernel"}


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """Names of the kernels that are launched."""
    launch = pytest.importorskip("tadsr.kernels.gpu.launch")
    names, run = [], launch.Launch.__init__

    def count(self, kernel, *arguments, **options):
        names.append(kernel.fn.__name__)
        run(self, kernel, *arguments, **options)

    monkeypatch.setattr(launch.Launch, "__init__", count)
    return names


def test_the_result_is_that_of_plain_modules(launched):
    networks = [network.to(DEVICE) for network in build_networks((8, 8), 2)]
    alphas_cumprod = torch.linspace(0.99, 0.01, 1000)
    lq, timesteps, embeds = (x.to(DEVICE) for x in make_inputs(2, 4, 4, [300, 900]))
    results = []
    for choice in ("eager", EnginePlan(fused_kernels=True)):
        engine = OneStepEngine(*networks, alphas_cumprod, choice)
        results.append(engine.restore(lq, timesteps, embeds))
        assert set(launched) == (set() if choice == "eager" else KERNELS)
    assert relative_error(results[1], results[0]) < 1e-5


@pytest.mark.parametrize("color_fix", ENDS)
def test_a_picture_ends_in_its_kernel(color_fix, model_dir, launched):
    pipe = TADSRPipeline.from_pretrained(model_dir, engine="eager").to(DEVICE)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 3), np.uint8)
    options = {"color_fix": color_fix, "process_size": 0, "scale": 1}
    floats = pipe(Image.fromarray(pixels), output_type="pt", **options)
    assert launched == []
    result = np.asarray(pipe(Image.fromarray(pixels), **options))
    assert launched[-1] == ENDS[color_fix]
    assert np.abs(result - floats.permute(1, 2, 0).cpu().numpy() * 255).max() < 0.51
