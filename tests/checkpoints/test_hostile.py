"""Checkpoints that mean harm, or look like it: one of our errors, at once, and nothing is run."""

from __future__ import annotations

import json
import math
import os
import resource
import time
import zipfile

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tadsr.checkpoints import inspect_checkpoint, load_adapters, load_checkpoint
from tadsr.checkpoints.adapter_files import save_adapters
from tadsr.checkpoints.tensor_files import TensorReader
from tadsr.errors import CheckpointError

from .conftest import edit_json

SECONDS = 5


CONFIGS = {
    "scheduler/scheduler_config.json": [
        *({"num_train_timesteps": count} for count in (10**9, 1000.0)),
        *({"beta_start": math.nan}, {"beta_end": 5.0}, {"trained_betas": [0.1] * 10**5}),
    ],
    "unet/config.json": [
        *({"layers_per_block": count} for count in (10**6, [10**6] * 4)),
        {"transformer_layers_per_block": [[10**6] * 2] * 4},
        *({"block_out_channels": [10**9] * 4}, {"conv_in_kernel": 10**6}),
        *({"norm_eps": math.inf}, {"norm_eps": "x"}, {"mid_block_scale_factor": None}),
        *({"class_embed_type": "timestep"}, {"norm_num_groups": 0}),
        {"_class_name": ["UNet2DConditionModel"]},
    ],
    "time_vae/config.json": [
        *({"layers_per_block": 10**6}, {"latent_channels": 10**9}, {"scaling_factor": []}),
    ],
    "text_encoder/config.json": [
        *({"num_hidden_layers": 10**6}, {"vocab_size": 10**12}, {"layer_norm_eps": None}),
        {"hidden_act": "owner/kernel"},
        {"architectures": {"CLIPTextModel": 5}, "hidden_size": "x"},
    ],
    "tokenizer/tokenizer_config.json": [
        *({"model_max_length": length} for length in (0, "long", math.nan)),
        *({"pad_token": token} for token in ("<beyond>", None)),
    ],
    "tokenizer/vocab.json": [{"a</w>": 10**6}],
}


@pytest.mark.parametrize(
    ("file", "changes"), [(file, changes) for file, each in CONFIGS.items() for changes in each]
)
def test_configurations_larger_than_their_weights_are_refused_at_once(official, file, changes):
    edit_json(official / file, **changes)
    begin = time.process_time()
    with pytest.raises(CheckpointError, match=file.partition("/")[0]):
        load_checkpoint(official)
    assert time.process_time() - begin < SECONDS


def test_a_configuration_cannot_choose_code(official):
    hostile = {
        "_attn_implementation": "owner/kernel",
        "attn_implementation": "owner/kernel",
        "_attn_implementation_internal": "owner/kernel",
        "auto_map": {"AutoModel": "owner/name--modeling.Model"},
        "quantization_config": {"quant_method": "bitsandbytes"},
        "architectures": 5,
    }
    edit_json(official / "text_encoder" / "config.json", **hostile)
    edit_json(official / "unet" / "config.json", **hostile, _diffusers_version="99")
    loaded = load_checkpoint(official)
    assert loaded.text_encoder.config._attn_implementation == "sdpa"
    for config in (loaded.text_encoder.config.to_dict(), dict(loaded.unet.config)):
        assert "owner" not in str(config)


@pytest.mark.parametrize("stated", [None, 10**12, 5])
def test_a_tokenizer_gives_no_more_than_the_text_encoder_reads(official, stated):
    path = official / "tokenizer" / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), "model_max_length": stated}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    loaded = load_checkpoint(official)
    assert loaded.tokenizer.model_max_length == (stated if stated == 5 else 77)
    tokens = loaded.tokenizer("a cat", padding="max_length", truncation=True).input_ids
    assert len(tokens) == loaded.tokenizer.model_max_length


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json"])
def test_deep_json_and_pipes_are_refused(native, file):
    text = (native / file).read_text()
    (native / file).write_text('{"a":' + "[" * 10**5 + "]" * 10**5 + "}")
    with pytest.raises(CheckpointError, match="must be JSON"):
        load_checkpoint(native)
    (native / file).unlink()
    os.mkfifo(native / file)
    with pytest.raises(CheckpointError):
        load_checkpoint(native)
    (native / file).unlink()
    (native / file).write_text(text)
    weights = native / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    os.mkfifo(weights)
    with pytest.raises(CheckpointError, match="pipe"):
        load_checkpoint(native)


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ("abc", "tadsr_metadata"),
        *(({"default_timestep": t}, "default_timestep") for t in ("5", -1)),
        *(({"default_process_size": px}, "default_process_size") for px in (None, True, 10**9)),
    ],
)
def test_metadata_must_be_an_object_of_facts(native, metadata, named):
    edit_json(native / "model_index.json", tadsr_metadata=metadata)
    for read in (load_checkpoint, inspect_checkpoint):
        with pytest.raises(CheckpointError, match=named):
            read(native)


@pytest.mark.parametrize(
    "state",
    [
        {"a": torch.eye(3).to_sparse()},
        {"a": torch.empty(3, device="meta")},
        {"a": torch.ones(1).expand(10**12)},
        {5: torch.ones(3)},
        {"a": [1, 2]},
        [torch.ones(3)],
    ],
)
def test_pickles_must_hold_plain_tensors(adapter_file, tmp_path, state):
    torch.save(state, tmp_path / "model.bin")
    with pytest.raises(CheckpointError, match="must hold tensors"):
        TensorReader([tmp_path / "model.bin"])
    data = torch.load(adapter_file, weights_only=True)
    torch.save({**data, "state_dict_unet": state}, tmp_path / "tadsr.pkl")
    with pytest.raises(CheckpointError, match="must hold tensors"):
        load_adapters(tmp_path / "tadsr.pkl")


PICKLES = {
    "arguments": b"ctorch._utils\n_rebuild_tensor_v2\n(K\0tR",  # which torch cannot take
    "objects": b"]" * 5_000_000,  # lists of 56 bytes each
    "text": b"X\x05\0\0\0\xff",
    "tuples": b"})q\0" + b"h\0h\0\x86q\0" * 60 + b"K\1s",  # a key that is hashed 2 ** 60 times
}


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(
            *(name, method),
            marks=[pytest.mark.slow] * (name == "objects" and method != zipfile.ZIP_STORED),
        )
        for name in PICKLES
        for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, None)
    ],
)
def test_pickles_that_torch_stumbles_over_are_refused(tmp_path, name, method):
    path, objects = tmp_path / "tadsr.pkl", b"\x80\x02" + PICKLES[name] + b"."
    if method is None:
        path.write_bytes(objects)
    else:
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("archive/data.pkl", objects)
            archive.writestr("archive/version", b"3\n")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"tadsr\.pkl (is damaged|must hold tensors as)"):
        load_adapters(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


@pytest.mark.parametrize("alpha", ["[" * 10**5, "NaN", '"8"', "[8]", "-8", "true", None])
def test_adapters_state_a_number_as_alpha(apart, tmp_path, alpha):
    path = tmp_path / "adapters.safetensors"
    save_adapters(apart.adapters, path)
    with safe_open(path, "pt") as file:
        metadata = {**file.metadata(), "alpha": alpha}
    save_file(load_file(path), path, {k: v for k, v in metadata.items() if v is not None})
    with pytest.raises(CheckpointError, match="alpha"):
        load_adapters(path)


@pytest.mark.parametrize("change", [{"unet_lora_encoder_modules": m} for m in (None, 5, [["a"]])])
def test_published_adapters_list_modules_by_name(adapter_file, tmp_path, change):
    torch.save(torch.load(adapter_file, weights_only=True) | change, tmp_path / "tadsr.pkl")
    with pytest.raises(CheckpointError, match="unet_lora_encoder_modules"):
        load_adapters(tmp_path / "tadsr.pkl")


def test_a_tokenizer_reads_files_of_its_own_folder_only(official, tmp_path):
    place = official / "tokenizer"
    vocab = json.loads((place / "vocab.json").read_text())
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_text(json.dumps(dict(zip(vocab, reversed(vocab.values()), strict=True))))
    names = ("vocab_file", "tokenizer_file", "added_tokens_file", "chat_template")
    foreign = {
        **dict.fromkeys(names, str(elsewhere)),
        "auto_map": {"AutoTokenizer": ["a--b.C", None]},
    }
    edit_json(place / "tokenizer_config.json", **foreign)
    tokenizer = load_checkpoint(official).tokenizer
    assert tokenizer.get_vocab() == vocab
    assert "elsewhere" not in str(tokenizer.init_kwargs)
    os.mkfifo(place / "added_tokens.json")
    with pytest.raises(CheckpointError, match="pipe"):
        load_checkpoint(official)


@pytest.mark.skipif(transformers.__version__ < "5", reason="version 4 adds the token again")
def test_tokenizers_without_their_unknown_token_are_refused(official):
    path = official / "tokenizer" / "vocab.json"
    vocab = json.loads(path.read_text())
    del vocab["<|endoftext|>"]
    path.write_text(json.dumps(vocab))
    with pytest.raises(CheckpointError, match="makes no tokenizer"):
        load_checkpoint(official)


def test_of_a_damaged_file_only_the_beginning_is_read(native):
    path = native / "unet" / "diffusion_pytorch_model.safetensors"
    os.truncate(path, 0)
    os.truncate(path, 2**36)  # a hole, which takes no room
    with pytest.raises(CheckpointError, match="must be safetensors"):
        load_checkpoint(native)


def test_long_names_make_no_long_messages(official):
    save_file({"a" * 10**6: torch.ones(1)}, official / "unet/diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(official)
    assert len(str(caught.value)) < 5000


def test_whole_numbers_are_no_weights(official):
    path = official / "unet" / "diffusion_pytorch_model"
    tensors = {n: t.to(torch.int32) for n, t in load_file(f"{path}.safetensors").items()}
    save_file(tensors, f"{path}.safetensors")
    with pytest.raises(CheckpointError, match="must hold floats"):
        load_checkpoint(official)


@pytest.mark.parametrize("path", ["~nobody-of-this-name/model", "a" * 5000, "a/" * 5000, "a\0b"])
def test_paths_that_cannot_be(native, path):
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    with pytest.raises(CheckpointError):
        load_checkpoint(native, adapter=path)


@pytest.mark.parametrize("stage", [None, {}, {"kind": "distillation"}])
def test_a_run_that_tells_too_little_or_names_itself_is_refused(tmp_path, stage):
    config = {"stage": stage, "model": str(tmp_path), "vae": None, "seed": 0}
    for config_told in (config, {}, [], None):
        (tmp_path / "progress.json").write_text(json.dumps({"step": 1, "config": config_told}))
        with pytest.raises(CheckpointError, match="must"):
            load_checkpoint(tmp_path)
