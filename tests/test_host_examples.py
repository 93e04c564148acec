"""Files that are copied into other programs, as far as they run without those."""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tadsr import TimestepMap

EXAMPLES = Path(__file__).parents[1] / "examples"


def load_file(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def nodes():
    return load_file(EXAMPLES / "comfyui_tadsr.py")


def arguments_of(node):
    """The default of every widget, as ComfyUI fills them in."""
    found = {}
    for name, (kind, *options) in node.INPUT_TYPES()["required"].items():
        if isinstance(kind, list):
            found[name] = kind[0]
        elif options:
            found[name] = options[0]["default"]
    return found


def run(nodes, name, **inputs):
    cls = nodes.NODE_CLASS_MAPPINGS[name]
    results = getattr(cls(), cls.FUNCTION)(**(arguments_of(cls) | inputs))
    assert len(results) == len(cls.RETURN_TYPES)
    return results[0]


@pytest.fixture
def model(nodes):
    return run(nodes, "LoadTADSR")


@pytest.fixture
def image():
    return torch.rand(2, 10, 12, 3, generator=torch.Generator().manual_seed(0))


def test_comfyui_nodes_are_those_of_the_library(nodes, model, image):
    assert set(nodes.NODE_CLASS_MAPPINGS) == set(nodes.NODE_DISPLAY_NAME_MAPPINGS)
    result = run(nodes, "UpscaleTADSR", model=model, image=image)
    assert result.shape == (2, 40, 48, 3)
    assert result.dtype == torch.float32
    assert 0 <= result.min() < result.max() <= 1
    assert torch.equal(result, model(image.movedim(-1, 1)).movedim(1, -1))


def test_a_comfyui_mask_has_its_own_timestep(nodes, model, image):
    mask = torch.zeros(10, 12)
    mask[:, :6] = 1
    settings = {"scale": 1.0, "timestep": 900, "masked_timestep": 1}
    shared = {"model": model, "image": image} | settings
    result = run(nodes, "UpscaleTADSR", mask=mask, **shared)
    both = run(nodes, "UpscaleTADSR", mask=mask.expand(2, -1, -1), **shared)
    expected = TimestepMap.from_image(np.where(mask.numpy() > 0, 1, 900))
    plain = model(image.movedim(-1, 1), [expected, expected], scale=1)
    assert torch.allclose(result, plain.movedim(1, -1), atol=1e-5)
    assert torch.equal(result, both)
    with pytest.raises(ValueError, match="1 mask or 2, got 3"):
        run(nodes, "UpscaleTADSR", mask=mask.expand(3, -1, -1), **shared)


def test_comfyui_shows_progress_and_cancels(monkeypatch):
    class CancelledError(Exception):
        pass

    shares = []

    class Bar:
        def __init__(self, total):
            self.total = total

        def update_absolute(self, value, total):
            assert total == self.total
            shares.append(value / total)

    def check():
        if len(shares) == 2:
            raise CancelledError

    # ComfyUI's own modules, reduced to what the node calls.
    host, management, bars = (types.ModuleType(n) for n in ("comfy", "management", "utils"))
    management.get_torch_device = lambda: torch.device("cpu")
    management.throw_exception_if_processing_interrupted = check
    bars.ProgressBar = Bar
    host.model_management = management
    monkeypatch.setitem(sys.modules, "comfy", host)
    monkeypatch.setitem(sys.modules, "comfy.utils", bars)
    nodes = load_file(EXAMPLES / "comfyui_tadsr.py")
    model = run(nodes, "LoadTADSR")
    large = torch.rand(1, 160, 160, 3)  # computed in pieces, which are told one by one
    with pytest.raises(CancelledError):
        run(nodes, "UpscaleTADSR", model=model, image=large, max_memory_gb=1.0)
    assert shares == sorted(shares)
    assert len(shares) == 2


def test_the_space_says_how_it_is_run():
    folder = EXAMPLES / "space"
    front = re.match(r"---\n(.*?)\n---\n", (folder / "README.md").read_text("utf-8"), re.DOTALL)
    settings = yaml.safe_load(front[1])
    assert settings["sdk"] == "gradio"
    assert (folder / settings["app_file"]).is_file()
    project = (EXAMPLES.parent / "pyproject.toml").read_text("utf-8")
    (wanted,) = (folder / "requirements.txt").read_text("utf-8").split()
    assert wanted == "tadsr[demo]"
    lowest = re.search(r'^demo = \["gradio>=(\d+)', project, re.MULTILINE)[1]
    assert int(settings["sdk_version"].split(".")[0]) >= int(lowest)


@pytest.mark.demo
def test_the_space_answers(tmp_path):
    from gradio_client import Client, handle_file
    from PIL import Image

    app = load_file(EXAMPLES / "space" / "app.py")
    Image.linear_gradient("L").resize((24, 16)).convert("RGB").save(tmp_path / "photo.png")
    _, address, _ = app.demo.launch(prevent_thread_lock=True, quiet=True)
    try:
        client = Client(address, verbose=False)
        painting = {"background": None, "layers": [], "composite": None}
        settings = ("tadsr-tiny", 300, 1, painting, 4, "", "adain", None)
        photo = handle_file(tmp_path / "photo.png")
        _, summary, file = client.predict(photo, *settings, api_name="/restore")
        assert summary.startswith("24×16 to 96×64 px")
        with Image.open(file if isinstance(file, str) else file["value"]) as image:
            assert image.size == (96, 64)
    finally:
        app.demo.close()
