"""Shared fixtures: the small model in the published layout and its recorded figures."""

import copy
import functools
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

import hypothesis
import pytest
import torch
import typer.testing
from safetensors.torch import load_file, save_file

if "PYTEST_XDIST_WORKER" in os.environ:
    # Processes side by side, and what they start, would fight for the same cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)

# A first call into torch can take longer than hypothesis' 200 ms, which says nothing about a law.
hypothesis.settings.register_profile("tadsr", deadline=None)
hypothesis.settings.load_profile("tadsr")

DATA = Path(__file__).parent / "data"
GOLDEN = DATA / "golden"


@pytest.fixture(scope="session", autouse=True)
def _interrupts() -> None:
    """Let Ctrl-C be tested where a shell in the background has it ignored, in children as well."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _findings(tmp_path_factory) -> Iterator[None]:
    """Keep what is found out about this machine out of the user's folder, and the other way."""
    from tadsr.machine import machine_key, remember

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TADSR_CACHE", str(tmp_path_factory.mktemp("findings")))
        threads = torch.get_num_threads()
        for count in {1, threads}:  # multiply in float32, however fast bfloat16 is here
            torch.set_num_threads(count)
            remember("bfloat16", machine_key(torch.device("cpu"), torch.bfloat16), 1.0)
        torch.set_num_threads(threads)
        # Nor time OpenVINO for each small model's first large image; its own tests do.
        patch.setattr("tadsr.onestep.step.OPENVINO_PX", sys.maxsize)
        yield


@pytest.fixture(scope="session", autouse=True)
def _commands() -> Iterator[None]:
    """Build the commands once, as a process does, and not for each that a test runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.testing, "_get_command", functools.cache(typer.testing._get_command))
        yield


@pytest.fixture(scope="session")
def imported() -> Iterator[ForkServerContext]:
    """Start processes from one that has imported what they take, and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    names = ("quick", "folders.run", "cli.model", "training.trainer", "training.recipe")
    context.set_forkserver_preload([f"tadsr.{name}" for name in (*names, "onnx_export")])
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1])  # where they find the tests' modules
        yield context


@pytest.fixture(scope="session")
def _loaded() -> dict:
    return {}


@pytest.fixture
def loaded_once(_loaded, model_dir, monkeypatch) -> None:
    """Load the models that do not change once for all commands, not for each."""
    from tadsr.cli.model import ModelRequest

    load_anew = ModelRequest.load

    def load(request, device):  # of that name, by which workers of other processes ask for it
        key = request, str(device)
        is_kept = request.source in ("tadsr-tiny", str(model_dir)) and not request.loras
        if not is_kept or key not in _loaded:
            _loaded[key] = load_anew(request, device)
        return _loaded[key]

    monkeypatch.setattr(ModelRequest, "load", load)


@pytest.fixture(scope="session")
def squeezenet(tmp_path_factory):
    """The file of a SqueezeNet at random weights."""
    from tadsr.measure.perceptual import _FIRE

    torch.manual_seed(0)
    tensors = {"conv1.weight": torch.randn(96, 3, 7, 7) * 0.01, "conv1.bias": torch.zeros(96)}
    for name, (width, squeeze, expand) in _FIRE.items():
        for part, shape in (
            ("squeeze", (squeeze, width, 1, 1)),
            ("expand1x1", (expand, squeeze, 1, 1)),
            ("expand3x3", (expand, squeeze, 3, 3)),
        ):
            tensors[f"{name}.{part}.weight"] = torch.randn(shape) * 0.1
            tensors[f"{name}.{part}.bias"] = torch.zeros(shape[0])
    path = tmp_path_factory.mktemp("squeezenet") / "net.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture(scope="session")
def data_dir() -> Path:
    return DATA


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "golden.safetensors")


@pytest.fixture(scope="session")
def golden_cases() -> list[tuple[int, int, int, str]]:
    return [tuple(case) for case in json.loads((GOLDEN / "cases.json").read_text())]


@pytest.fixture(scope="session")
def official_layout() -> dict:
    return json.loads((DATA / "official_layout.json").read_text())


@pytest.fixture(scope="session")
def golden_pipeline():
    from tadsr import TADSRPipeline

    return TADSRPipeline.from_pretrained(GOLDEN / "base", adapter=GOLDEN / "tadsr.pkl")


@pytest.fixture
def own_pipeline(golden_pipeline):
    """The same for a test that changes it."""
    return copy.deepcopy(golden_pipeline)


@pytest.fixture(scope="session")
def unmerged_pipeline():
    from tadsr import TADSRPipeline

    return TADSRPipeline.from_pretrained(
        GOLDEN / "base", adapter=GOLDEN / "tadsr.pkl", merge_adapters=False
    )


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory) -> Path:
    """The base model of a published checkpoint: the recorded one's texts, and fewer layers."""
    from tadsr.checkpoints import load_checkpoint, save_official
    from tadsr.networks.adapters import attach_new_adapters
    from tests.small_models import small_unet, small_vae

    texts = load_checkpoint(GOLDEN / "base", adapter=GOLDEN / "tadsr.pkl")
    torch.manual_seed(0)
    unet = small_unet(cross_attention_dim=texts.text_encoder.config.hidden_size)
    vae = small_vae(mid_block_add_attention=False)
    attach_new_adapters(unet, vae, rank=4, alpha=8)
    for model in (unet, vae):
        for name, parameter in model.requires_grad_(False).named_parameters():
            if "lora_B" in name:  # nothing otherwise
                parameter.normal_(std=0.1)
    parts = {**texts.components(), "unet": unet, "vae": vae}
    folder = tmp_path_factory.mktemp("published")
    save_official(folder / "base", **parts)
    (folder / "base" / "tadsr.pkl").rename(folder / "tadsr.pkl")
    return folder / "base"


@pytest.fixture(scope="session")
def adapter_file(base_dir) -> Path:
    return base_dir.with_name("tadsr.pkl")


@pytest.fixture(scope="session")
def small_pipeline(base_dir, adapter_file):
    from tadsr import TADSRPipeline

    return TADSRPipeline.from_pretrained(base_dir, adapter=adapter_file)


@pytest.fixture(scope="module")
def pipe():
    """The model that the package holds; each module has one to itself, which it may change."""
    from tadsr import TADSRPipeline

    return TADSRPipeline.from_pretrained("tadsr-tiny")


@pytest.fixture(scope="module")
def unenlarged() -> Iterator[None]:
    """Restore small photos at their own size where nothing else is said, which takes no seconds."""
    from tadsr import TADSRPipeline

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TADSRPipeline, "default_process_size", 0)
        yield


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    """A tiny model with random weights, saved in the native format."""
    from tadsr.networks.prompt_embeddings import PromptEmbeddings
    from tests.small_models import pipeline_of, small_unet, small_vae

    torch.manual_seed(0)
    vae, unet = small_vae(mid_block_add_attention=False), small_unet()
    pipe = pipeline_of(vae, unet, PromptEmbeddings(embedding_dim=8))
    folder = tmp_path_factory.mktemp("models") / "tiny"
    pipe.save_pretrained(folder)
    return folder
