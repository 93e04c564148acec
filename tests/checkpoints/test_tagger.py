"""The published tagger's files: a small one in their names, and what goes wrong with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from PIL import Image

from tadsr.checkpoints.hub import download
from tadsr.checkpoints.tagger import (
    TAG_LIST_FILE,
    TAGGER_ADAPTER_FILE,
    TAGGER_FILE,
    THRESHOLDS_FILE,
    _published_name,
    load_tagger,
    open_tagger,
)
from tadsr.errors import CheckpointError
from tadsr.prompts.tagger import Tagger, TaggerConfig, TaggerNetwork

SMALL = TaggerConfig(
    image_size=32,
    embed_dim=8,
    depths=(2, 2),
    num_heads=(2, 4),
    window_size=4,
    num_tags=5,
    label_dim=6,
    hidden_size=12,
    num_decoder_heads=3,
    intermediate_size=20,
)
TAGS = ("tree", "lake", "night sky", "dog", "street")
BLOCK = "visual_encoder.layers.0.blocks.1"


def published_shapes(config: TaggerConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of RAM by their published names, from the sizes alone."""
    d, label, hidden = config.embed_dim, config.label_dim, config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "visual_encoder.patch_embed.proj.weight": (d, 3, 4, 4),
        "visual_encoder.patch_embed.proj.bias": (d,),
        "label_embed": (config.num_tags, label),
    }

    def linear(name: str, num_out: int, num_in: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (num_out, num_in)
        if bias:
            shapes[f"{name}.bias"] = (num_out,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    norm("visual_encoder.patch_embed.norm", d)
    for i, (depth, heads) in enumerate(zip(config.depths, config.num_heads, strict=True)):
        layer, w = f"visual_encoder.layers.{i}", d * 2**i
        for j in range(depth):
            block = f"{layer}.blocks.{j}"
            norm(f"{block}.norm1", w)
            norm(f"{block}.norm2", w)
            linear(f"{block}.attn.qkv", 3 * w, w)
            linear(f"{block}.attn.proj", w, w)
            linear(f"{block}.mlp.fc1", 4 * w, w)
            linear(f"{block}.mlp.fc2", w, 4 * w)
            rows = (2 * config.window_size - 1) ** 2
            shapes[f"{block}.attn.relative_position_bias_table"] = (rows, heads)
        if i < len(config.depths) - 1:
            norm(f"{layer}.downsample.norm", 4 * w)
            linear(f"{layer}.downsample.reduction", 2 * w, 4 * w, bias=False)
    norm("visual_encoder.norm", w)
    linear("image_proj", label, w)
    linear("wordvec_proj", hidden, label)
    linear("fc", 1, hidden)
    for k in range(config.num_decoder_layers):
        layer = f"tagging_head.encoder.layer.{k}"
        linear(f"{layer}.crossattention.self.query", hidden, hidden)
        linear(f"{layer}.crossattention.self.key", hidden, label)
        linear(f"{layer}.crossattention.self.value", hidden, label)
        linear(f"{layer}.crossattention.output.dense", hidden, hidden)
        norm(f"{layer}.crossattention.output.LayerNorm", hidden)
        linear(f"{layer}.intermediate.dense", config.intermediate_size, hidden)
        linear(f"{layer}.output.dense", hidden, config.intermediate_size)
        norm(f"{layer}.output.LayerNorm", hidden)
    return shapes


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in published_shapes(SMALL).items():
        # Neither vanishing nor saturated anywhere, so that every tensor counts in the result.
        random = torch.randn(shape, generator=generator)
        is_norm = "norm" in name.lower() and name.endswith("weight")
        fan_in = shape[-1] if name.endswith("weight") and not is_norm else 1
        tensors[name] = 1 + 0.2 * random if is_norm else 1.5 * random / fan_in**0.5
    return tensors


@pytest.fixture
def adapter() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        f"{BLOCK}.attn.qkv.lora_A": torch.randn(2, 8, generator=generator),
        f"{BLOCK}.attn.qkv.lora_B": torch.randn(24, 2, generator=generator),
    }


@pytest.fixture
def folder(tmp_path, state, adapter) -> Path:
    computed = {
        f"{BLOCK}.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.int64),
        f"{BLOCK}.attn_mask": torch.zeros(4, 16, 16),
        "text_decoder.cls.predictions.bias": torch.zeros(7),
    }
    torch.save({"model": {**state, **computed}, "epoch": 3}, tmp_path / TAGGER_FILE)
    torch.save(adapter, tmp_path / TAGGER_ADAPTER_FILE)
    (tmp_path / TAG_LIST_FILE).write_text("\n".join(TAGS) + "\n")
    (tmp_path / THRESHOLDS_FILE).write_text("0.5\n0.65\n0.7\n0.35\n0.68\n")
    return tmp_path


def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 31, 3), np.uint8)
    return Image.fromarray(pixels)


def reference_logits(state: dict[str, torch.Tensor], config: TaggerConfig, x: torch.Tensor):
    """RAM as its paper and Swin's describe it, in the published names, one window at a time."""

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(name: str, x: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
        weight = state[f"{name}.weight"]
        return F.layer_norm(x, weight.shape, weight, state[f"{name}.bias"], eps)

    def attention(q, k, v, heads, bias=0.0):
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(0, 1) for t in (q, k, v))
        scores = q @ k.mT / q.shape[-1] ** 0.5 + bias
        return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)

    def window_attention(name: str, x: torch.Tensor, heads: int, shift: int) -> torch.Tensor:
        side, size = x.shape[0], config.window_size
        table = state[f"{name}.relative_position_bias_table"]
        out = torch.zeros_like(x)
        for top in range(0, side, size):
            for left in range(0, side, size):
                cells = [(top + r, left + c) for r in range(size) for c in range(size)]
                bias = x.new_zeros(heads, len(cells), len(cells))
                for a, (ra, ca) in enumerate(cells):
                    for b, (rb, cb) in enumerate(cells):
                        row = (ra - rb + size - 1) * (2 * size - 1) + ca - cb + size - 1
                        bias[:, a, b] = table[row]
                        # After the cyclic shift, what wrapped around is no neighbour.
                        wrapped = [(p + shift >= side) for p in (ra, ca, rb, cb)]
                        if wrapped[:2] != wrapped[2:]:
                            bias[:, a, b] -= 100
                places = [((r + shift) % side, (c + shift) % side) for r, c in cells]
                tokens = torch.stack([x[r, c] for r, c in places])
                q, k, v = linear(f"{name}.qkv", tokens).chunk(3, dim=-1)
                mixed = linear(f"{name}.proj", attention(q, k, v, heads, bias))
                for (r, c), token in zip(places, mixed, strict=True):
                    out[r, c] = token
        return out

    root = "visual_encoder"
    patches = F.conv2d(
        x, state[f"{root}.patch_embed.proj.weight"], state[f"{root}.patch_embed.proj.bias"], 4
    )
    x = norm(f"{root}.patch_embed.norm", patches[0].permute(1, 2, 0))
    for i, (depth, heads) in enumerate(zip(config.depths, config.num_heads, strict=True)):
        for j in range(depth):
            name = f"{root}.layers.{i}.blocks.{j}"
            is_whole = x.shape[0] <= config.window_size
            shift = 0 if j % 2 == 0 or is_whole else config.window_size // 2
            x = x + window_attention(f"{name}.attn", norm(f"{name}.norm1", x), heads, shift)
            hidden = F.gelu(linear(f"{name}.mlp.fc1", norm(f"{name}.norm2", x)))
            x = x + linear(f"{name}.mlp.fc2", hidden)
        if i < len(config.depths) - 1:
            name = f"{root}.layers.{i}.downsample"
            corners = [x[r::2, c::2] for r, c in ((0, 0), (1, 0), (0, 1), (1, 1))]
            x = linear(f"{name}.reduction", norm(f"{name}.norm", torch.cat(corners, -1)))
    tokens = norm(f"{root}.norm", x).flatten(0, 1)
    image = linear("image_proj", torch.cat([tokens.mean(0, keepdim=True), tokens]))
    labels = F.relu(linear("wordvec_proj", state["label_embed"]))
    for k in range(config.num_decoder_layers):
        name = f"tagging_head.encoder.layer.{k}"
        cross = f"{name}.crossattention"
        q, key, v = (
            linear(f"{cross}.self.{part}", source)
            for part, source in (("query", labels), ("key", image), ("value", image))
        )
        mixed = linear(f"{cross}.output.dense", attention(q, key, v, config.num_decoder_heads))
        labels = norm(f"{cross}.output.LayerNorm", mixed + labels, 1e-12)
        hidden = F.gelu(linear(f"{name}.intermediate.dense", labels))
        hidden = linear(f"{name}.output.dense", hidden)
        labels = norm(f"{name}.output.LayerNorm", hidden + labels, 1e-12)
    return linear("fc", labels)[:, 0]


def test_full_size_network_has_exactly_the_published_tensors():
    with init_empty_weights(include_buffers=False):
        network = TaggerNetwork()
    expected = published_shapes(TaggerConfig())
    rows = dict.fromkeys(expected, 0)
    for name, tensor in network.state_dict().items():
        source, _ = _published_name(name)
        rows[source] += len(tensor)
        assert tuple(tensor.shape[1:]) == expected[source][1:]
    assert rows == {name: shape[0] for name, shape in expected.items()}
    assert sum(t.numel() for t in network.state_dict().values()) == 212_117_045


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_published_weights_and_adapter_compute_what_the_papers_say(folder, state, adapter, scale):
    # In double precision, where rounding hides nothing.
    tagger = load_tagger(folder, config=SMALL, adapter_scale=scale, torch_dtype=torch.float64)
    product = adapter[f"{BLOCK}.attn.qkv.lora_B"] @ adapter[f"{BLOCK}.attn.qkv.lora_A"]
    state[f"{BLOCK}.attn.qkv.weight"] += scale * product
    state = {name: tensor.double() for name, tensor in state.items()}
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2)).double()
    with torch.no_grad():
        found = tagger.network(pixels)
    expected = reference_logits(state, SMALL, pixels)
    torch.testing.assert_close(found[0], expected, atol=1e-10, rtol=0)
    # Every part counts, or a wrong one would pass as well.
    for name, tensor in state.items():
        # Softmax takes a bias of the keys away.
        if len(tensor) > 1 and not name.endswith("key.bias"):
            changed = {**state, name: tensor.flip(0)}
            difference = reference_logits(changed, SMALL, pixels) - expected
            assert difference.abs().max() > 1e-8, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_loaded_and_runs(folder, dtype):
    tagger = load_tagger(folder, config=SMALL, torch_dtype=dtype)
    assert tagger.network.fc.weight.dtype == dtype
    assert isinstance(tagger(picture()), str)


def test_older_name_and_wrappers_are_understood(folder, state, adapter):
    expected = load_tagger(folder, config=SMALL)
    renamed = {f"module.{n.replace('tagging_head', 'vision_multi')}": t for n, t in state.items()}
    torch.save(renamed, folder / TAGGER_FILE)
    peft = {
        f"base_model.model.{n.replace('lora_A', 'lora_A.default.weight')}": t
        for n, t in adapter.items()
    }
    torch.save({"params": peft}, folder / TAGGER_ADAPTER_FILE)
    found = load_tagger(folder, config=SMALL)
    for name, tensor in expected.network.state_dict().items():
        assert torch.equal(tensor, found.network.state_dict()[name]), name


@pytest.mark.parametrize("name", [TAGGER_FILE, TAGGER_ADAPTER_FILE, TAG_LIST_FILE, THRESHOLDS_FILE])
def test_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=rf"needs {folder / name}, but 1 of its files"):
        load_tagger(folder, config=SMALL)


def test_missing_extra_and_misshapen_tensors_are_named(folder, state):
    del state[f"{BLOCK}.attn.proj.bias"]
    state["fc.weight"] = torch.zeros(2, 12)
    state["visual_encoder.head.weight"] = torch.zeros(2)
    torch.save({"model": state}, folder / TAGGER_FILE)
    with pytest.raises(CheckpointError) as caught:
        load_tagger(folder, config=SMALL)
    message = str(caught.value)
    assert f"1 missing ({BLOCK}.attn.proj.bias)" in message
    assert "1 extra (visual_encoder.head.weight)" in message
    assert "fc.weight (2, 12) instead of (1, 12)" in message


@pytest.mark.parametrize(
    "change",
    [
        {f"{BLOCK}.attn.qkv.lora_B": torch.zeros(16, 2)},
        {f"{BLOCK}.attn.other.lora_A": torch.zeros(2, 8)},
        {f"{BLOCK}.attn.qkv.bias": torch.zeros(3)},
    ],
)
def test_adapter_that_does_not_fit_is_refused(folder, adapter, change):
    torch.save({**adapter, **change}, folder / TAGGER_ADAPTER_FILE)
    with pytest.raises(CheckpointError, match=r"1 do not .*adapter=None"):
        load_tagger(folder, config=SMALL)


def test_adapter_of_something_else_is_refused(folder):
    torch.save({"unet.to_q.lora_A": torch.zeros(2, 8)}, folder / TAGGER_ADAPTER_FILE)
    with pytest.raises(CheckpointError, match="0 fit"):
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
    with pytest.raises(CheckpointError, match=r"must have 5 lines, .* got 2"):
        load_tagger(folder, config=SMALL)
    (folder / TAG_LIST_FILE).write_text("\n".join(TAGS))
    (folder / THRESHOLDS_FILE).write_text("0.5\nhalf\n0.5\n0.5\n0.5\n")
    with pytest.raises(CheckpointError, match="one number a line"):
        load_tagger(folder, config=SMALL)


def test_a_user_may_name_a_folder_the_published_one_or_a_callable(folder):
    assert open_tagger(None, folder) is None
    assert open_tagger(len, folder) is len
    with pytest.raises(TypeError, match="got int"):
        open_tagger(3, folder)
    # The sizes are the published ones here, which the small files do not have.
    for named, checkpoint in (("dape", folder), (folder, "elsewhere")):
        with pytest.raises(CheckpointError, match="must have 4585 lines"):
            open_tagger(named, checkpoint)


def test_the_published_layout_has_the_weights_under_these_names(official_layout):
    assert {TAGGER_FILE, TAGGER_ADAPTER_FILE} <= official_layout["files"].keys()
    # At least the tagging part in float32 fits into the published file.
    assert official_layout["files"][TAGGER_FILE] > 4 * 212_117_045


def test_download_takes_only_what_it_is_told_from_the_cache(tmp_path):
    with pytest.raises(CheckpointError, match="must be in the hub's cache"):
        download("owner/name", names=(TAGGER_FILE,), cache_dir=tmp_path, local_files_only=True)


def test_small_files_describe_a_picture(folder):
    tagger = load_tagger(folder, config=SMALL)
    assert isinstance(tagger, Tagger)
    assert set(filter(None, tagger(picture()).split(", "))) <= set(TAGS)
