"""Further LoRAs: files as other libraries write them change the model as those libraries do."""

from __future__ import annotations

import copy
import functools
import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from tadsr import TADSRPipeline
from tadsr.errors import CheckpointError

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TARGETS = ["to_q", "to_out.0", "conv1", "proj_in"]
WEIGHTS = "pytorch_lora_weights.safetensors"
assert_same = functools.partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4)


@pytest.fixture
def pipe(small_pipeline):
    return copy.deepcopy(small_pipeline)


def config(**changes):
    return LoraConfig(r=3, lora_alpha=7, target_modules=TARGETS, init_lora_weights=False, **changes)


def with_lora(unet, lora):
    """A copy of the model with PEFT's own layers, unmerged."""
    torch.manual_seed(1)
    model = copy.deepcopy(unet)
    model.add_adapter(lora, "extra")
    return model


def save_as_diffusers(model, lora, folder):
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(model, adapter_name="extra"),
        unet_lora_adapter_metadata=lora.to_dict(),
    )
    return folder / WEIGHTS


@pytest.fixture
def lora_file(pipe, tmp_path):
    return save_as_diffusers(with_lora(pipe.unet, config()), config(), tmp_path)


def unet_output(unet):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    width = unet.config.cross_attention_dim
    prompt_embeds = torch.randn(1, 5, width, generator=generator)
    with torch.no_grad():
        return unet(latents, torch.tensor([300]), prompt_embeds).sample


@pytest.mark.parametrize(
    "changes", [{}, {"use_rslora": True}, {"alpha_pattern": {"to_q": 2.5}}], ids=str
)
def test_a_file_of_diffusers_does_what_peft_does(pipe, tmp_path, changes):
    lora = config(**changes)
    model = with_lora(pipe.unet, lora)
    before, expected = unet_output(pipe.unet), unet_output(model)
    assert (expected - before).abs().max() > 1e-2
    pipe.merge_lora(save_as_diffusers(model, lora, tmp_path))
    assert_same(unet_output(pipe.unet), expected)


def test_a_folder_of_peft_and_flat_names_do_the_same(pipe, tmp_path):
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(pipe.unet), config())
    model.save_pretrained(tmp_path / "peft")
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    flat = {}
    for name, tensor in tensors.items():
        module, side, _ = name.removeprefix("base_model.model.").rsplit(".", 2)
        stem = "lora_unet_" + module.replace(".", "_")
        flat[f"{stem}.{'lora_down' if side == 'lora_A' else 'lora_up'}.weight"] = tensor
        flat[f"{stem}.alpha"] = torch.tensor(7.0)
    save_file(flat, tmp_path / "flat.safetensors")
    expected = unet_output(model)
    for source in (tmp_path / "peft", tmp_path / "flat.safetensors"):
        fresh = copy.deepcopy(pipe)
        fresh.merge_lora(source)
        assert_same(unet_output(fresh.unet), expected)


def test_scale_weighs_it_and_the_negative_undoes_it(pipe, lora_file):
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    pipe.merge_lora(lora_file, scale=0.5)
    name = "conv_in.weight"
    assert torch.equal(pipe.unet.state_dict()[name], before[name])
    changed = [n for n, t in pipe.unet.state_dict().items() if not torch.equal(t, before[n])]
    assert changed
    assert all(any(target in n for target in TARGETS) for n in changed)
    pipe.merge_lora(lora_file, scale=-0.5)
    for name, tensor in pipe.unet.state_dict().items():
        torch.testing.assert_close(tensor, before[name], atol=1e-5, rtol=1e-5)


def test_the_text_encoders_part_changes_prompts_the_kept_empty_one_too(pipe, tmp_path):
    lora = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(2)
    encoder = copy.deepcopy(pipe.text_encoder)
    # Not by transformers, whose releases ask for versions of PEFT that are not out yet.
    inject_adapter_in_model(lora, encoder, "extra")
    layers = get_peft_model_state_dict(encoder, adapter_name="extra")
    StableDiffusionPipeline.save_lora_weights(tmp_path, text_encoder_lora_layers=layers)
    before = pipe.encode_prompt([""])
    with torch.no_grad():
        tokens = pipe.tokenizer("", padding="max_length", return_tensors="pt").input_ids
        expected = encoder(tokens)[0]
    pipe.merge_lora(tmp_path)
    found = pipe.encode_prompt([""])
    assert_same(found, expected)
    assert (found - before).abs().max() > 1e-3


def test_adapters_kept_apart_stay_apart(base_dir, adapter_file, pipe, lora_file):
    apart = TADSRPipeline.from_pretrained(base_dir, adapter=adapter_file, merge_adapters=False)
    for merging in (apart, pipe):
        merging.merge_lora(lora_file)
    assert apart.adapters is not None
    assert_same(unet_output(apart.unet), unet_output(pipe.unet))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unet.other.lora_A.weight": (1, 1)}, "only one of its"),
        ({"unet.conv_in.bias": (1,)}, "unet.conv_in.bias"),
        (
            {
                "unet.conv_out.lora_A.weight": (2, 3, 3, 3),
                "unet.conv_out.lora_B.weight": (4, 2, 1, 1),
            },
            r"unet\.conv_out \[\(2, 3, 3, 3\), \(4, 2, 1, 1\)\] for",
        ),
        (None, "holds no LoRA"),
        ({"unet.conv_out.alpha": (2,)}, r"unet\.conv_out\.alpha"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(pipe, lora_file, changes, message):
    more = {name: torch.zeros(shape) for name, shape in (changes or {}).items()}
    save_file({} if changes is None else load_file(lora_file) | more, lora_file)
    before = unet_output(pipe.unet)
    with pytest.raises(CheckpointError, match=message):
        pipe.merge_lora(lora_file)
    assert torch.equal(unet_output(pipe.unet), before)


def test_settings_are_numbers_and_patterns_that_end(pipe, tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    out, *inside = pipe.unet.conv_out.weight.shape
    sides = {"A": torch.zeros(2, *inside), "B": torch.zeros(out, 2, 1, 1)}
    for text in (
        *('{"lora_alpha": NaN}', '{"lora_alpha": "2"}', '{"lora_alpha": [2]}'),
        *('{"alpha_pattern": ["to_q"]}', '{"alpha_pattern": {"(.|conv_out|.)+x": 2}}'),
    ):
        save_file({f"conv_out.lora_{side}.weight": t for side, t in sides.items()}, path)
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(CheckpointError, match="alpha"):
            pipe.merge_lora(tmp_path)
    for text in ("[" * 10**5, "[1]", "5"):
        tensors = {f"unet.conv_out.lora_{side}.weight": t for side, t in sides.items()}
        save_file(tensors, path, {"lora_adapter_metadata": text})
        with pytest.raises(CheckpointError, match="damaged metadata"):
            pipe.merge_lora(tmp_path)


def test_a_text_encoders_part_needs_a_text_encoder(tmp_path):
    tensors = {
        f"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_{side}.weight": t
        for side, t in (("A", torch.zeros(1, 4)), ("B", torch.zeros(4, 1)))
    }
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="the model has no text_encoder"):
        TADSRPipeline.from_pretrained("tadsr-tiny").merge_lora(tmp_path)


def test_dora_pickles_and_absent_files_are_refused(pipe, lora_file, tmp_path):
    stated = json.dumps({"unet.lora_alpha": 7, "unet.use_dora": True})
    save_file(load_file(lora_file), lora_file, metadata={"lora_adapter_metadata": stated})
    (tmp_path / "empty").mkdir()
    for source, message in (
        (lora_file, "without DoRA"),
        (tmp_path / "lora.bin", "pickles are not read"),
        (tmp_path / "empty", "holds neither"),
        (tmp_path / "absent.safetensors", "must exist, but is missing"),
    ):
        with pytest.raises(CheckpointError, match=message):
            pipe.merge_lora(source)


@pytest.mark.parametrize("prefix", ["unet.", ""])
def test_diffusers_names_until_0_21_do_the_same(prefix, pipe, tmp_path):
    lora = LoraConfig(r=3, lora_alpha=3, target_modules=ATTENTION, init_lora_weights=False)
    model = with_lora(pipe.unet, lora)
    old = {}
    for name, tensor in get_peft_model_state_dict(model, adapter_name="extra").items():
        module, side, _ = name.rsplit(".", 2)
        attention, _, layer = module.removesuffix(".0").rpartition(".")
        way = "down" if side == "lora_A" else "up"
        old[f"{prefix}{attention}.processor.{layer}_lora.{way}.weight"] = tensor
    save_file(old, tmp_path / "old.safetensors")
    expected = unet_output(model)
    pipe.merge_lora(tmp_path / "old.safetensors")
    assert_same(unet_output(pipe.unet), expected)


@pytest.mark.parametrize("name", ["q_proj.lora_linear_layer", "to_q_lora"])
def test_old_names_of_text_encoders(name, pipe, tmp_path):
    names = pipe.text_encoder.state_dict()
    layer = next(n for n in names if n.endswith("layers.0.self_attn.q_proj.weight"))
    weight = pipe.text_encoder.state_dict()[layer].clone()
    down, up = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
    stem = "text_encoder.text_model.encoder.layers.0.self_attn." + name
    save_file({f"{stem}.down.weight": down, f"{stem}.up.weight": up}, tmp_path / "old.safetensors")
    pipe.merge_lora(tmp_path / "old.safetensors")
    torch.testing.assert_close(pipe.text_encoder.state_dict()[layer], weight + up @ down)
