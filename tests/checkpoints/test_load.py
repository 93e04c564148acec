import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tadsr.checkpoints import load_checkpoint, save_native
from tadsr.errors import CheckpointError
from tadsr.networks.adapters import has_adapters

from .conftest import edit_json, same_tensors, split_into_shards


def test_published_checkpoint_loads_ready_to_run(golden_dir):
    merged = load_checkpoint(golden_dir / "base", adapter=golden_dir / "tadsr.pkl")
    assert merged.format == "official"
    assert merged.adapters is None
    for model in (merged.unet, merged.vae, merged.text_encoder):
        assert not model.training
        assert not has_adapters(model)
        assert not any(p.requires_grad for p in model.parameters())
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert merged.scheduler.config.beta_schedule == "scaled_linear"
    assert "non-commercial" in merged.metadata["license"]


def test_tokenizer_pads_as_its_files_say(merged):
    ids = merged.tokenizer("cat", padding="max_length", max_length=6).input_ids
    assert ids[-1] == merged.tokenizer.convert_tokens_to_ids("!") == 0


def test_adapters_kept_apart_are_attached(apart):
    assert has_adapters(apart.unet)
    assert has_adapters(apart.vae)
    assert apart.adapters.rank_unet == 4
    assert not any(p.requires_grad for p in apart.unet.parameters())
    assert not apart.vae.training


@torch.no_grad()
def test_loaded_apart_computes_what_merged_computes(apart, merged):
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    outputs = [c.vae.encode(x, 300).latent_dist.mode() for c in (apart, merged)]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)


def test_merge_rounds_once_to_half_precision(base_dir, adapter_file, merged):
    half = load_checkpoint(base_dir, adapter=adapter_file, torch_dtype=torch.float16)
    assert same_tensors(half.unet, copy.deepcopy(merged.unet).half())
    assert half.vae.dtype == half.text_encoder.dtype == torch.float16


def test_loaded_weights_are_independent_of_each_other(official):
    first, second = load_checkpoint(official), load_checkpoint(official)
    first.unet.conv_in.weight.data.zero_()
    assert second.unet.conv_in.weight.abs().sum() > 0
    assert load_checkpoint(official).unet.conv_in.weight.abs().sum() > 0


def test_pickled_base_weights_load_alike(official, merged):
    for folder, stem, new in (
        ("time_vae", "diffusion_pytorch_model", "diffusion_pytorch_model"),
        ("text_encoder", "model", "pytorch_model"),
    ):
        old = official / folder / f"{stem}.safetensors"
        torch.save(load_file(old), official / folder / f"{new}.bin")
        old.unlink()
    loaded = load_checkpoint(official)
    assert same_tensors(loaded.vae, merged.vae)
    assert same_tensors(loaded.text_encoder, merged.text_encoder)


def test_text_encoder_names_of_every_library_version_load(official, merged):
    path = official / "text_encoder" / "model.safetensors"
    tensors = {n.removeprefix("text_model."): t.clone() for n, t in load_file(path).items()}
    tensors["embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, path)
    loaded = load_checkpoint(official).text_encoder
    assert same_tensors(loaded, merged.text_encoder)
    ids = torch.tensor([[1, 5, 2]])
    with torch.no_grad():
        assert torch.equal(loaded(ids)[0], merged.text_encoder(ids)[0])


def test_pndm_config_gives_its_betas(official):
    edit_json(
        official / "scheduler" / "scheduler_config.json",
        _class_name="PNDMScheduler",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        beta_end=0.02,
    )
    scheduler = load_checkpoint(official).scheduler
    assert type(scheduler).__name__ == "DDPMScheduler"
    assert scheduler.config.beta_end == 0.02


@pytest.mark.parametrize(
    ("adapter", "message"),
    [(None, "give the file as adapter="), ("nowhere.pkl", r"nowhere\.pkl.*looked for")],
)
def test_base_without_its_adapter_says_what_to_give(base_dir, adapter, message):
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(base_dir, adapter=adapter)


def edited(file, **changes):
    return lambda folder: edit_json(folder / file, **changes)


def written(file, content):
    return lambda folder: (folder / file).write_text(content)


def with_another_rank(folder):
    data = torch.load(folder / "tadsr.pkl", weights_only=True)
    torch.save(data | {"rank_unet": 3}, folder / "tadsr.pkl")


SCHEDULE, TOKENIZER = "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"
UNET, VAE, TEXT = "unet/config.json", "time_vae/config.json", "text_encoder/config.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (written(UNET, "{"), r"unet/config\.json must be JSON"),
        (written(UNET, "[]"), r"unet/config\.json must hold a JSON object"),
        (edited(UNET, _class_name="AutoencoderKL"), "UNet2DConditionModel, got Auto"),
        (edited(UNET, cross_attention_dim=8), "must fit|misshapen"),
        (written(VAE, '{"time_scale_shift": "ada"}'), r"time_vae/config\.json makes no"),
        (written(TEXT, '{"hidden_size": 5}'), r"text_encoder/config\.json makes no"),
        (edited(SCHEDULE, prediction_type="v_prediction"), r"scheduler_config\.json.*SD 2\.1-base"),
        (written(SCHEDULE, "{}"), r"lacks \['beta_start'"),
        (written(TOKENIZER, "nope"), r"tokenizer_config\.json must be JSON"),
        (written("tokenizer/vocab.json", "<html>"), r"tokenizer makes no tokenizer"),
        (written(WEIGHTS, "<html>"), "model.safetensors.*web page"),
        (written(WEIGHTS, ""), "model.safetensors.*empty"),
        (written("tadsr.pkl", "version https://git-lfs.github.com"), r"tadsr\.pkl.*git lfs pull"),
        (written("tadsr.pkl", "<!DOCTYPE html>"), r"tadsr\.pkl.*web page"),
        (with_another_rank, r"tadsr\.pkl does not fit .*misshapen"),
        *(
            (lambda folder, name=name: shutil.rmtree(folder / name), name)
            for name in ("unet", "time_vae", "text_encoder", "tokenizer", "scheduler")
        ),
    ],
)
def test_damage_is_named(official, damage, message):
    damage(official)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(official)


def test_native_checkpoint_loads(native, merged):
    loaded = load_checkpoint(native)
    assert loaded.format == "native"
    assert loaded.text_encoder is None
    assert loaded.tokenizer is None
    assert loaded.prompt_embeddings(["sharp"]).shape == (1, 3, 16)
    assert same_tensors(loaded.unet, merged.unet)
    assert loaded.metadata == {"license": "apache-2.0"}


def test_native_needs_a_source_of_prompts(native):
    shutil.rmtree(native / "prompt_embeddings")
    with pytest.raises(CheckpointError, match="no prompt can be embedded"):
        load_checkpoint(native)


def test_native_refuses_pickles(native):
    path = native / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    with pytest.raises(CheckpointError, match=r"found diffusion_pytorch_model\.bin; convert"):
        load_checkpoint(native)


def test_native_base_takes_other_adapters(native, adapter_file):
    loaded = load_checkpoint(native, adapter=adapter_file, merge_adapters=False)
    assert has_adapters(loaded.unet)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded_weights_load_alike(merged, tmp_path, variant):
    folder = save_native(tmp_path / "model", **merged.components(), variant=variant)
    infix = f".{variant}" if variant else ""
    path = folder / "unet" / f"diffusion_pytorch_model{infix}.safetensors"
    split_into_shards(path, "diffusion_pytorch_model")
    assert same_tensors(load_checkpoint(folder).unet, merged.unet)


@pytest.mark.parametrize("is_outside", [False, True])
def test_shards_must_be_there_and_beside_their_index(native, is_outside):
    stem = "diffusion_pytorch_model"
    split_into_shards(native / WEIGHTS, stem)
    if is_outside:
        index = native / "unet" / f"{stem}.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"a": "../vae/model.safetensors"}}))
    else:
        (native / "unet" / f"{stem}-00002-of-00002.safetensors").unlink()
    told = "must name files beside it" if is_outside else r"00002-of-00002\.safetensors must exist"
    with pytest.raises(CheckpointError, match=told):
        load_checkpoint(native)


def test_only_variant_is_taken_and_an_absent_one_lists_what_exists(merged, tmp_path):
    folder = save_native(tmp_path / "m", **merged.components(), variant="fp16", dtype=torch.float16)
    assert load_checkpoint(folder, torch_dtype="auto").unet.dtype == torch.float16
    assert load_checkpoint(folder).unet.dtype == torch.float32
    with pytest.raises(CheckpointError, match=r"bf16\.safetensors, found .*fp16\.safetensors"):
        load_checkpoint(folder, variant="bf16")


def test_plain_files_come_before_variants(native):
    path = native / "unet" / "diffusion_pytorch_model.safetensors"
    zeros = {n: torch.zeros_like(t) for n, t in load_file(path).items()}
    save_file(zeros, path.with_name("diffusion_pytorch_model.other.safetensors"))
    assert load_checkpoint(native).unet.conv_in.weight.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.int8, "half"])
def test_dtype_must_be_floating(native, dtype):
    with pytest.raises(TypeError, match="torch_dtype must be"):
        load_checkpoint(native, torch_dtype=dtype)
