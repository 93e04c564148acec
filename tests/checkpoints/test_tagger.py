"""The published tagger: what the published code computed with a small one in the same layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tadsr.checkpoints.ram_weights import RamWeights, is_used, ram_name
from tadsr.checkpoints.tagger import (
    CONVERTED_FILE,
    TAG_LIST_FILE,
    TAGGER_ADAPTER_FILE,
    TAGGER_FILE,
    THRESHOLDS_FILE,
    convert_tagger,
    load_tagger,
    open_tagger,
)
from tadsr.errors import CheckpointError
from tadsr.prompts.choice import join_prompt
from tadsr.prompts.tagger import Tagger, TaggerConfig, usual_dtype

from .conftest import repository_of, same_tensors
from .hub_server import Fault

GOLDEN = Path(__file__).parents[1] / "data" / "tagger"
FACTS = json.loads((GOLDEN / "golden.json").read_text())
SMALL = TaggerConfig(**FACTS["config"])
IMAGES = tuple(FACTS["images"])
ADAPTERS = {"dape": TAGGER_ADAPTER_FILE, "plain": None, "leak": "leak.pth"}
VIEWS = {"tadsr": "enlarged", "ram_on_lq": "whole"}
FILES = (TAGGER_FILE, TAGGER_ADAPTER_FILE, TAG_LIST_FILE, THRESHOLDS_FILE)
BLOCK = "visual_encoder.layers.0.blocks.1"


@pytest.fixture(scope="module")
def recorded() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "golden.safetensors")


@pytest.fixture
def folder(tmp_path) -> Path:
    """The published files, to be changed."""
    for name in FILES:
        shutil.copyfile(GOLDEN / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def lists(folder, tmp_path_factory) -> Path:
    """Where the two lists have gone."""
    place = tmp_path_factory.mktemp("lists")
    for name in (TAG_LIST_FILE, THRESHOLDS_FILE):
        (folder / name).rename(place / name)
    return place


@pytest.fixture
def leaking(folder, recorded) -> Path:
    """The files with an adapter whose tag encoder has learned, too."""
    adapter = torch.load(folder / TAGGER_ADAPTER_FILE, weights_only=True)
    changed = {n.removeprefix("leak."): t for n, t in recorded.items() if n.startswith("leak.")}
    assert changed.keys() < adapter.keys()
    torch.save(adapter | changed, folder / ADAPTERS["leak"])
    return folder


def change(path: Path, **values: torch.Tensor | None) -> None:
    """Replace tensors of a file, or take them out."""
    data = torch.load(path, weights_only=True)
    state = data.get("model", data)
    for name, tensor in values.items():
        state.pop(name, None)
        if tensor is not None:
            state[name] = tensor
    torch.save(data, path)


@pytest.mark.parametrize("model", ADAPTERS)
def test_logits_tags_and_prompts_are_those_of_the_published_code(leaking, recorded, model):
    tagger = load_tagger(leaking, adapter=ADAPTERS[model], config=SMALL)
    compared = 0
    for name in IMAGES:
        image = Image.open(GOLDEN / name)
        for view, shown in VIEWS.items():
            run = FACTS["images"][name]["runs"].get(f"{view}.{model}")
            if run is None:
                continue
            tagger.view = shown
            with torch.no_grad():
                logits = tagger.network(tagger._prepare([image]))
            expected = recorded[f"{name}.{view}.{model}.logits"]
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
            torch.testing.assert_close(
                torch.sigmoid(logits)[0], torch.tensor(run["probabilities"]), atol=5e-6, rtol=0
            )
            tags = tagger(image)
            assert tags == run["tags"]
            assert join_prompt(tags, "", "published") == run["prompt_default"]
            assert join_prompt(tags, "a photo of a lake", "published") == run["prompt_user"]
            compared += 1
    assert compared == (6 if model == "dape" else 3)


def test_the_merged_weights_are_the_published_codes_bit_by_bit(recorded):
    state = torch.load(GOLDEN / TAGGER_FILE, weights_only=True)["model"]
    weights = RamWeights(GOLDEN / TAGGER_FILE, SMALL, state)
    plain = dict(weights.state)
    weights.merge(GOLDEN / TAGGER_ADAPTER_FILE)
    merged = {n.removeprefix("merged."): t for n, t in recorded.items() if n.startswith("merged.")}
    for name, tensor in merged.items():
        assert torch.equal(weights.state[name], tensor), name
    untouched = [name for name in weights.expected if name not in merged]
    assert all(weights.state[name] is plain[name] for name in untouched)


def test_the_full_size_has_exactly_the_published_names_and_shapes(tmp_path):
    names = json.loads((GOLDEN / "names_full.json").read_text())
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in names["ram"].items()}
        adapter = {name: torch.empty(shape) for name, shape in names["dape"].items()}
    weights = RamWeights(Path("full"), TaggerConfig(), state)
    assert len(weights.expected) == 366
    assert {n for n in names["ram"] if is_used(n)} == weights.expected.keys()
    assert sum(t.numel() for t in weights.network.state_dict().values()) == 212_117_045
    assert {ram_name(name)[0] for name in weights.network.state_dict()} == weights.expected.keys()
    weights.merge_tensors(adapter, "DAPE.pth")
    assert weights.adapter == "DAPE.pth"
    assert sum(t.numel() for t in adapter.values()) * 4 < 7_194_489
    assert len(adapter) == 248


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs_with_thresholds_as_they_are(dtype):
    tagger = load_tagger(GOLDEN, config=SMALL, torch_dtype=dtype)
    assert tagger.network.fc.weight.dtype == dtype
    assert tagger.to(dtype).thresholds.dtype == torch.float32
    tags = tagger.tag_batch([Image.open(GOLDEN / name) for name in IMAGES])
    if dtype == torch.float16:  # as on CUDA, unless told otherwise
        assert usual_dtype(torch.device("cuda")) == dtype
        assert tags == [FACTS["images"][name]["runs"]["tadsr.dape"]["tags"] for name in IMAGES]


def test_a_converted_folder_is_the_same_tagger(tmp_path):
    out = convert_tagger(GOLDEN, tmp_path / "ram", config=SMALL)
    suffixes = sorted(path.suffix for path in out.iterdir())
    assert suffixes == [".json", ".safetensors", ".txt", ".txt"]
    found, expected = load_tagger(out), load_tagger(GOLDEN, config=SMALL)
    assert found.network.config == SMALL
    assert same_tensors(found.network, expected.network)
    assert (found.tags, found.thresholds.tolist()) == (expected.tags, expected.thresholds.tolist())
    with pytest.raises(CheckpointError, match=r"DAPE\.pth merged for good, but None was asked"):
        load_tagger(out, adapter=None)
    with pytest.raises(CheckpointError, match="must be new or empty"):
        convert_tagger(GOLDEN, out, config=SMALL)
    half = convert_tagger(
        GOLDEN, out, config=SMALL, adapter=None, torch_dtype=torch.float16, overwrite=True
    )
    assert {t.dtype for t in load_file(half / CONVERTED_FILE).values()} == {torch.float16}
    assert open_tagger(half).network.fc.weight.dtype == torch.float32
    (half / "tagger.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tagger\.json must describe"):
        load_tagger(half)


def test_lists_may_lie_elsewhere(folder, lists, tmp_path):
    with pytest.raises(CheckpointError, match="2 of its files are missing"):
        load_tagger(folder, config=SMALL)
    assert load_tagger(folder, config=SMALL, lists=lists).tags[0] == "3D CG rendering"
    out = convert_tagger(folder, tmp_path / "out", config=SMALL, lists=lists)
    assert load_tagger(out).tags[-1] == "zoo"


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=rf"needs {folder / name}, but 1 of its files"):
        load_tagger(folder, config=SMALL)


def test_missing_extra_and_misshapen_tensors_are_named(folder):
    wrong = {
        f"{BLOCK}.attn.proj.bias": None,
        "fc.weight": torch.zeros(2, 32),
        "visual_encoder.head.weight": torch.zeros(2),
    }
    change(folder / TAGGER_FILE, **wrong)
    with pytest.raises(CheckpointError) as caught:
        load_tagger(folder, config=SMALL)
    message = str(caught.value)
    assert f"1 missing ({BLOCK}.attn.proj.bias)" in message
    assert "1 extra (visual_encoder.head.weight)" in message
    assert "fc.weight (2, 32) instead of (1, 32)" in message


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        # The layout of a plain adapter on query, key and value together.
        (f"{BLOCK}.attn.qkv.lora_B", torch.zeros(36, 8), "does not fit"),
        (f"{BLOCK}.attn.qkv.lora_B", None, "does not fit"),
        (f"{BLOCK}.attn.other.lora_A", torch.zeros(2, 8), "no module of RAM's"),
        (f"{BLOCK}.attn.qkv.bias", torch.zeros(3), "no lora_A or lora_B"),
    ],
)
def test_adapter_that_does_not_fit_is_refused(folder, name, tensor, message):
    change(folder / TAGGER_ADAPTER_FILE, **{name: tensor})
    with pytest.raises(CheckpointError, match=rf"but 1 do not fit: .*{message}.*adapter=None"):
        load_tagger(folder, config=SMALL)


def test_an_adapter_of_a_part_only_or_of_something_else_is_refused(folder):
    names = [f"{BLOCK}.attn.qkv.lora_A", f"{BLOCK}.attn.qkv.lora_B"]
    change(folder / TAGGER_ADAPTER_FILE, **dict.fromkeys(names))
    with pytest.raises(CheckpointError, match=rf"1 do not fit: {BLOCK}.attn.qkv is missing"):
        load_tagger(folder, config=SMALL)
    torch.save({"unet.to_q.lora_A": torch.zeros(2, 8)}, folder / TAGGER_ADAPTER_FILE)
    with pytest.raises(CheckpointError, match=r"unet\.to_q is no module"):
        load_tagger(folder, config=SMALL)


def test_code_in_a_file_is_never_run(folder, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    for name in (TAGGER_FILE, TAGGER_ADAPTER_FILE):
        whole = (folder / name).read_bytes()
        torch.save({"model": Trap()}, folder / name)
        with pytest.raises(CheckpointError, match="refused for safety"):
            load_tagger(folder, config=SMALL)
        (folder / name).write_bytes(whole)
    assert not (tmp_path / "ran").exists()


def test_lists_must_have_a_line_per_tag(folder):
    (folder / TAG_LIST_FILE).write_text("tree\nlake\n")
    with pytest.raises(CheckpointError, match=r"must have 12 lines, .* got 2"):
        load_tagger(folder, config=SMALL)
    (folder / THRESHOLDS_FILE).write_text("half\n" * 12)
    with pytest.raises(CheckpointError, match="one number a line"):
        load_tagger(folder, config=SMALL)


def test_a_user_may_name_a_tagger_in_many_ways(folder, tmp_path, monkeypatch):
    assert open_tagger(None, folder) is None
    assert open_tagger(len, folder) is len
    assert isinstance(open_tagger("dape", folder, config=SMALL), Tagger)
    assert isinstance(open_tagger("ram", folder, config=SMALL), Tagger)
    assert isinstance(open_tagger(folder, "elsewhere", config=SMALL), Tagger)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_tagger.py").write_text("word = 'x'\ndef describe(image): return 'a street'\n")
    assert open_tagger("my_tagger:describe")(None) == "a street"
    for wrong in ("my_tagger:lacking", "my_tagger:word", "no_such_module:describe"):
        with pytest.raises(ValueError, match=f"tagger '{wrong}' must be"):
            open_tagger(wrong)
    with pytest.raises(ValueError, match="must lie beside a checkpoint"):
        open_tagger("dape")
    with pytest.raises(TypeError, match="got int"):
        open_tagger(3, folder)


def test_the_published_layout_has_the_weights_under_these_names(official_layout):
    assert {TAGGER_FILE, TAGGER_ADAPTER_FILE} <= official_layout["files"].keys()
    # At least the tagging part in float32 fits into the published file.
    assert official_layout["files"][TAGGER_FILE] > 4 * 212_117_045


def test_the_published_repository_lends_its_weights_and_the_lists_lie_here(
    hub, folder, lists, tmp_path
):
    hub.repositories["owner/name"] = repository_of(folder)
    hub.faults = [Fault("large", TAGGER_FILE, times=1, cut_after=1_500_000)]
    with pytest.raises(CheckpointError, match=r"lacks ram_tag_list\.txt"):
        load_tagger("owner/name", config=SMALL)
    out = convert_tagger("owner/name", tmp_path / "out", config=SMALL, lists=lists)
    fetched = {path.rpartition("/")[2] for part, _, path, _ in hub.requests if part == "hub"}
    assert {TAGGER_FILE, TAGGER_ADAPTER_FILE} <= fetched
    assert "a.png" not in fetched
    hub.repositories["owner/small"] = repository_of(out)
    assert load_tagger("owner/small").tags == load_tagger(out).tags
    assert load_tagger("owner/small", local_files_only=True).tags == load_tagger(out).tags
    with pytest.raises(CheckpointError, match="must be in the hub's cache"):
        load_tagger("owner/other", local_files_only=True)


def test_several_images_are_tagged_together_as_alone():
    tagger = load_tagger(GOLDEN, config=SMALL)
    images = [Image.open(GOLDEN / name) for name in IMAGES * 3]
    images.append(np.asarray(images[0].convert("L")))
    assert tagger.tag_batch(images) == [tagger(image) for image in images]
