"""Files that are copied into other programs, as far as they run without those."""

import importlib.util
import inspect
import json
import re
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tadsr import TimestepMap
from tadsr.errors import CheckpointError

EXAMPLES = Path(__file__).parents[1] / "examples"


def load_file(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def nodes():
    return load_file(EXAMPLES / "comfyui" / "nodes.py")


def arguments_of(node):
    """The default of every widget, as ComfyUI fills them in."""
    found = {}
    for name, (kind, *options) in node.INPUT_TYPES()["required"].items():
        if isinstance(kind, list):
            found[name] = kind[0]
        elif options:
            found[name] = options[0]["default"]
    return found


def run(nodes, name, /, **inputs):
    """Run a node as ComfyUI does: in torch's inference mode, which nothing may leave traces of."""
    cls = nodes.NODE_CLASS_MAPPINGS[name]
    small = {} if name == "LoadTADSR" else {"process_size": 0}
    with torch.inference_mode():
        inputs = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        results = getattr(cls(), cls.FUNCTION)(**(arguments_of(cls) | small | inputs))
    assert len(results) == len(cls.RETURN_TYPES)
    return results[0]


@pytest.fixture(scope="module")
def model(nodes):
    return run(nodes, "LoadTADSR")


@pytest.fixture
def image():
    return torch.rand(2, 10, 12, 3, generator=torch.Generator().manual_seed(0))


def restored(model, image, *arguments, **settings):
    """What the library gives, in ComfyUI's layout."""
    result = model(image.movedim(-1, 1), *arguments, **{"process_size": 0} | settings)
    return result.movedim(1, -1)


@pytest.mark.parametrize("channels", [3, 4])
def test_an_alpha_mask_goes_in_and_comes_out(channels, nodes, model, image):
    clear = torch.zeros(1, 5, 6)  # of another size, for all images
    clear[:, :, 3:] = 1
    if channels == 4:
        image = torch.cat([image, torch.ones(2, 10, 12, 1)], -1)
    node = nodes.NODE_CLASS_MAPPINGS["UpscaleTADSR"]
    inputs = arguments_of(node) | {"model": model, "process_size": 0}
    hidden = image.clone()
    hidden[:, :, 8:, :3] = torch.tensor([1.0, 0, 1])  # beyond what the mask's edge touches
    colors, mask = node().upscale(**inputs | {"image": image, "alpha": clear})
    assert colors.shape == (2, 40, 48, 3)
    assert mask.shape == (2, 40, 48)
    assert mask[:, :, :12].max() < 0.01
    assert mask[:, :, 36:].min() > 0.99
    assert torch.allclose(node().upscale(**inputs | {"image": hidden, "alpha": clear})[0], colors)
    assert not node().upscale(**inputs | {"image": image[..., :3]})[1].any()


def test_comfyui_finds_every_input_and_its_default(nodes):
    assert set(nodes.NODE_CLASS_MAPPINGS) == set(nodes.NODE_DISPLAY_NAME_MAPPINGS)
    returned = {kind for node in nodes.NODE_CLASS_MAPPINGS.values() for kind in node.RETURN_TYPES}
    for node in nodes.NODE_CLASS_MAPPINGS.values():
        parameters = inspect.signature(getattr(node, node.FUNCTION)).parameters
        inputs = node.INPUT_TYPES()
        everything = inputs["required"] | inputs.get("optional", {})
        assert ["self", *everything] == list(parameters)
        for name in inputs.get("optional", {}):
            assert parameters[name].default is not inspect.Parameter.empty
        for kind, *options in everything.values():
            if isinstance(kind, list):
                assert all(isinstance(choice, str) for choice in kind)
            elif kind in ("INT", "FLOAT"):
                assert options[0]["min"] <= options[0]["default"] <= options[0]["max"]
            else:
                assert kind in returned | {"STRING", "IMAGE", "MASK"}
        assert isinstance(node.CATEGORY, str)


def test_comfyuis_workflow_fits_the_nodes(nodes):
    workflow = json.loads((EXAMPLES / "comfyui" / "workflow.json").read_text("utf-8"))
    for step in workflow.values():
        node = nodes.NODE_CLASS_MAPPINGS.get(step["class_type"])
        if node is not None:
            inputs = node.INPUT_TYPES()
            given = step["inputs"].keys()
            assert inputs["required"].keys() <= given
            assert given <= inputs["required"].keys() | inputs["optional"].keys()


def test_comfyui_lists_the_models_of_its_folder(nodes, model_dir, tmp_path, monkeypatch):
    folder = tmp_path / "tadsr" / "mine"
    shutil.copytree(model_dir, folder)
    host = types.SimpleNamespace(models_dir=str(tmp_path))
    monkeypatch.setattr(nodes, "folder_paths", host)
    assert nodes.LoadTADSR.INPUT_TYPES()["required"]["name"][0] == ["tadsr-tiny", "mine"]
    (loaded,) = nodes.LoadTADSR().load("mine", "fp32")
    assert list(loaded.unet.config.block_out_channels) == [8, 8]


def test_comfyui_defaults_are_the_librarys(nodes, model, image):
    one = image[:1, :2, :2]
    result = run(nodes, "UpscaleTADSR", model=model, image=one, process_size=-1)
    assert torch.equal(result, restored(model, one, process_size=None))


@pytest.mark.parametrize(
    "settings",
    [
        {"scale": 4.0, "timestep": 1},
        {"scale": 1.0, "timestep": 999, "color_fix": "wavelet"},
        {"scale": 2.5, "timestep": 300, "color_fix": "none"},
    ],
)
def test_comfyui_images_are_restored_as_the_library_does(nodes, model, image, settings):
    result = run(nodes, "UpscaleTADSR", model=model, image=image, **settings)
    scale = settings["scale"]
    assert result.shape == (2, round(10 * scale), round(12 * scale), 3)
    assert result.dtype == torch.float32
    assert result.device.type == "cpu"
    assert result.is_contiguous()
    assert 0 <= result.min() < result.max() <= 1
    assert torch.equal(result, restored(model, image, **settings))
    # Each image of a batch is its own.
    for number in range(2):
        one = run(nodes, "UpscaleTADSR", model=model, image=image[number : number + 1], **settings)
        assert torch.allclose(one[0], result[number], atol=1e-5)


def test_comfyui_images_may_overshoot_and_have_alpha(nodes, model, image):
    wild = torch.cat([image * 3 - 1, image[..., :1] + 1], dim=-1)  # opaque
    result = run(nodes, "UpscaleTADSR", model=model, image=wild)
    assert torch.allclose(result, restored(model, (image * 3 - 1).clamp(0, 1)), atol=1e-5)


def test_comfyui_computes_in_pieces_what_the_whole_gives(nodes, model, image):
    whole = run(nodes, "UpscaleTADSR", model=model, image=image)
    for settings in ({"max_memory_gb": 0.5}, {"attention_px": "512"}):
        pieces = run(nodes, "UpscaleTADSR", model=model, image=image, **settings)
        assert torch.allclose(pieces, whole, atol=1e-4)


def test_comfyui_prompts_reach_the_model(nodes, model, image, tmp_path, base_dir, adapter_file):
    with pytest.raises(ValueError, match="prompt"):
        run(nodes, "UpscaleTADSR", model=model, image=image, prompt="a lighthouse")
    folder = shutil.copytree(base_dir, tmp_path / "published")
    shutil.copy(adapter_file, folder)
    reading = run(nodes, "LoadTADSR", name=str(folder), dtype="fp32")
    results = [
        run(nodes, "UpscaleTADSR", model=reading, image=image, prompt=prompt)
        for prompt in ("", "a lighthouse")
    ]
    assert not torch.equal(*results)
    assert torch.equal(results[1], restored(reading, image, prompt="a lighthouse"))


def test_comfyui_loads_in_the_chosen_type(nodes):
    auto = torch.float16 if torch.cuda.is_available() else torch.float32
    for name, dtype in (("auto", auto), ("fp32", torch.float32), ("bf16", torch.bfloat16)):
        loaded = run(nodes, "LoadTADSR", dtype=name)
        assert {loaded.unet.dtype, loaded.vae.dtype} == {dtype}
    with pytest.raises(CheckpointError, match="nowhere"):
        run(nodes, "LoadTADSR", name="./nowhere")


def test_a_comfyui_mask_has_its_own_timestep(nodes, model, image):
    mask = torch.zeros(10, 12)
    mask[:, :6] = 1
    ends = {"timestep": 900, "masked_timestep": 1}
    shared = {"model": model, "image": image} | ends
    result = run(nodes, "UpscaleTADSR", mask=mask, **shared)
    expected = TimestepMap.from_image(np.where(mask.numpy() > 0, 1, 900))
    assert torch.allclose(result, restored(model, image, [expected, expected]), atol=1e-5)
    left, right = result.chunk(2, dim=2)
    for half, part, timestep in ((left, slice(0, 24), 1), (right, slice(24, None), 900)):
        own, other = (restored(model, image, t)[:, :, part] for t in (timestep, 901 - timestep))
        assert (half - own).norm() < (half - other).norm()
    for batch in (mask[None], mask.expand(2, -1, -1)):
        assert torch.equal(result, run(nodes, "UpscaleTADSR", mask=batch, **shared))


def test_a_comfyui_mask_per_image_and_of_any_size(nodes, model, image):
    ends = {"timestep": 900, "masked_timestep": 1}
    shared = {"model": model, "image": image} | ends
    # 64 × 64 zeros are what ComfyUI's loader gives for an image without alpha.
    masks = torch.stack([torch.zeros(64, 64), torch.ones(64, 64)])
    result = run(nodes, "UpscaleTADSR", mask=masks, **shared)
    assert torch.allclose(result, restored(model, image, [900, 1]), atol=1e-4)
    gray = run(nodes, "UpscaleTADSR", mask=torch.full((3, 5), 0.5), **shared)
    expected = TimestepMap.from_image(np.full((3, 5), 450.5, np.float32))
    assert torch.allclose(gray, restored(model, image, [expected, expected]), atol=1e-5)
    with pytest.raises(ValueError, match="1 mask or 2, got 3"):
        run(nodes, "UpscaleTADSR", mask=torch.zeros(3, 10, 12), **shared)


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
    nodes = load_file(EXAMPLES / "comfyui" / "nodes.py")
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
    assert (folder / "requirements.txt").read_text("utf-8").startswith("tadsr[demo] @ ")
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
