import copy
import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextModel

from tadsr.checkpoints import (
    convert_checkpoint,
    load_adapters,
    load_checkpoint,
    save_native,
    save_official,
)
from tadsr.errors import CheckpointError
from tadsr.networks.adapters import fuse_adapters, has_adapters

from .conftest import same_tensors

PARTS = ("unet", "vae", "text_encoder")


def same_parts(left, right):
    return all(same_tensors(getattr(left, part), getattr(right, part)) for part in PARTS)


def test_official_to_native_merged(merged, tmp_path):
    loaded = load_checkpoint(save_native(tmp_path / "native", **merged.components()))
    assert same_parts(loaded, merged)
    text = "the cat in a garden"
    assert loaded.tokenizer(text).input_ids == merged.tokenizer(text).input_ids
    assert loaded.tokenizer.pad_token == "!"
    assert torch.equal(loaded.scheduler.betas, merged.scheduler.betas)
    assert loaded.metadata == merged.metadata


def test_official_to_native_apart_to_official(base_dir, adapter_file, apart, tmp_path):
    native = save_native(tmp_path / "native", **apart.components())
    assert (native / "adapters.safetensors").is_file()
    loaded = load_checkpoint(native, merge_adapters=False)
    assert same_parts(loaded, apart)
    official = save_official(tmp_path / "official", **loaded.components())

    before, after = load_adapters(adapter_file), load_adapters(official / "tadsr.pkl")
    for part in ("unet", "vae", "vae_time"):
        assert same_tensors(getattr(before, part), getattr(after, part))
    # Whatever the adapters do not replace is the base's own.
    replaced = {"conv_in.weight", "conv_in.bias", *before.vae_time}
    for file in ("unet/diffusion_pytorch_model", "time_vae/diffusion_pytorch_model",
                 "text_encoder/model"):  # fmt: skip
        files = (load_file(folder / f"{file}.safetensors") for folder in (base_dir, official))
        a, b = ({n: t for n, t in file.items() if n not in replaced} for file in files)
        assert same_tensors(a, b)
    tokenizer = "tokenizer/vocab.json"
    assert (official / tokenizer).read_bytes() == (base_dir / tokenizer).read_bytes()


def test_native_apart_merges_on_loading(apart, merged, tmp_path):
    loaded = load_checkpoint(save_native(tmp_path / "native", **apart.components()))
    assert not has_adapters(loaded.unet)
    assert same_parts(loaded, merged)


def test_compiled_networks_are_saved_under_plain_names(apart, tmp_path):
    parts = copy.deepcopy(apart.components())
    parts["unet"] = torch.compile(parts["unet"], backend="eager")
    parts["vae"].decoder = torch.compile(parts["vae"].decoder, backend="eager")
    loaded = load_checkpoint(save_native(tmp_path / "native", **parts), merge_adapters=False)
    assert same_parts(loaded, apart)


@pytest.mark.parametrize(
    ("name", "part", "kind"),
    [
        ("scheduler", None, "DDPMScheduler to be saved, got NoneType"),
        ("unet", None, "UNet2DConditionModel"),
        ("text_encoder", None, "CLIPTextModel"),
        ("tokenizer", None, "CLIPTokenizer"),
        ("unet", torch.nn.DataParallel(torch.nn.Identity()), "got DataParallel"),
    ],
)
def test_what_lacks_a_part_is_not_saved(merged, tmp_path, name, part, kind):
    with pytest.raises(CheckpointError, match=f"{name} must be a .*{kind}"):
        save_native(tmp_path / "native", **merged.components() | {name: part})
    assert not list(tmp_path.iterdir())


def test_half_precision_variant(merged, tmp_path):
    folder = save_native(tmp_path / "m", **merged.components(), variant="fp16", dtype=torch.float16)
    assert (folder / "text_encoder" / "model.fp16.safetensors").is_file()
    loaded = load_checkpoint(folder, variant="fp16", torch_dtype=torch.float16)
    for part in PARTS:
        assert same_tensors(getattr(loaded, part), copy.deepcopy(getattr(merged, part)).half())
    assert merged.unet.dtype == torch.float32


def test_libraries_of_the_components_read_the_native_folder(merged, tmp_path):
    folder = save_native(tmp_path / "m", **merged.components(), dtype=torch.float16)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float16)
    assert torch.equal(unet.conv_out.weight, merged.unet.conv_out.weight.half())
    text = CLIPTextModel.from_pretrained(folder / "text_encoder", torch_dtype=torch.float16)
    assert text.dtype == torch.float16
    index = json.loads((folder / "model_index.json").read_text())
    assert index["vae"] == ["tadsr", "TimeAwareAutoencoderKL"]
    assert index["prompt_embeddings"] == [None, None]


def test_merged_model_cannot_be_split(merged, native, tmp_path):
    with pytest.raises(CheckpointError, match="cannot be split"):
        save_official(tmp_path / "out", **merged.components())
    with pytest.raises(CheckpointError, match="cannot be split"):
        convert_checkpoint(native, tmp_path / "out", to="official")
    assert not (tmp_path / "out").exists()


def test_folder_with_files_is_refused_unless_overwritten(merged, native, tmp_path):
    (native / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="must be new or empty"):
        save_native(native, **merged.components())
    assert (native / "mine.txt").exists()
    save_native(native, **merged.components(), overwrite=True)
    assert not (native / "mine.txt").exists()
    assert load_checkpoint(native).text_encoder is not None


def test_failed_writing_leaves_nothing_and_the_old_folder(apart, native):
    before = sorted(p.name for p in native.parent.iterdir())
    unet = load_checkpoint(native).unet
    with pytest.raises(CheckpointError, match="only one has"):
        save_native(native, **apart.components() | {"unet": unet}, overwrite=True)
    assert sorted(p.name for p in native.parent.iterdir()) == before
    assert load_checkpoint(native).format == "native"


def test_adapters_merged_since_loading_are_not_written_twice(base_dir, adapter_file, tmp_path):
    checkpoint = load_checkpoint(base_dir, adapter=adapter_file, merge_adapters=False)
    fuse_adapters(checkpoint.unet, checkpoint.vae)
    with pytest.raises(CheckpointError, match="leave adapters out"):
        save_native(tmp_path / "m", **checkpoint.components())
    save_native(tmp_path / "m", **{**checkpoint.components(), "adapters": None})
    assert load_checkpoint(tmp_path / "m").adapters is None


def test_targets_and_variants_that_cannot_be(merged, tmp_path):
    (tmp_path / "file").write_text("")
    for place, variant, error, message in (
        ("file/model", None, CheckpointError, "cannot be written"),
        ("file", None, CheckpointError, "is a file"),
        ("m", "../x", ValueError, "variant"),
    ):
        with pytest.raises(error, match=message):
            save_native(tmp_path / place, **merged.components(), variant=variant)


def test_overwriting_the_source_keeps_loaded_weights(native):
    loaded = load_checkpoint(native, torch_dtype="auto")
    before = loaded.unet.conv_in.weight.clone()
    save_native(native, **loaded.components(), overwrite=True)
    assert torch.equal(loaded.unet.conv_in.weight, before)
    assert torch.equal(load_checkpoint(native).unet.conv_in.weight, before)


def test_convert_keeps_the_stored_dtype_and_adapters(official, merged, tmp_path):
    folder = convert_checkpoint(official, tmp_path / "merged")
    assert same_tensors(load_checkpoint(folder).unet, merged.unet)
    half = convert_checkpoint(official, tmp_path / "half", dtype=torch.float16, keep_adapters=True)
    assert load_checkpoint(half, torch_dtype="auto").text_encoder.dtype == torch.float16
    kept = load_adapters(half / "adapters.safetensors").vae
    assert {t.dtype for t in kept.values()} == {torch.float32}
    back = convert_checkpoint(half, tmp_path / "back", to="official")
    assert load_checkpoint(back, torch_dtype="auto").unet.dtype == torch.float16


def test_convert_refuses_before_loading(native, tmp_path):
    with pytest.raises(CheckpointError, match="must be new or empty"):
        convert_checkpoint("does/not-exist", native)
    with pytest.raises(ValueError, match="'native' or 'official'"):
        convert_checkpoint(native, tmp_path / "x", to="onnx")


def test_written_files_are_as_readable_as_any_new_file(merged, tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    native = save_native(tmp_path / "native", **merged.components())
    files = [p for p in native.rglob("*") if p.is_file()]
    assert any(p.suffix == ".safetensors" for p in files)
    assert {p.stat().st_mode for p in files} == {plain.stat().st_mode}
