import json
from pathlib import Path

import pytest

from tadsr.checkpoints import inspect_checkpoint, save_native
from tadsr.checkpoints.detect import detect_format, locate
from tadsr.checkpoints.layout import NATIVE, OFFICIAL
from tadsr.errors import CheckpointError


def test_formats_are_told_from_content(native, base_dir):
    assert detect_format(native) is NATIVE
    assert detect_format(base_dir) is OFFICIAL


def test_empty_folders_and_plain_stable_diffusion_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="found nothing"):
        detect_format(tmp_path)
    (tmp_path / "unet").mkdir()
    index = {"_class_name": "StableDiffusionPipeline"}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"unet \(its .* StableDiffusionPipeline\)"):
        detect_format(tmp_path)


def test_existing_folder_comes_before_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate("owner/name") is None
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert locate("owner/name") == Path("owner/name")


def test_what_is_no_checkpoint_says_what_to_give(adapter_file, tmp_path):
    for source, message in (
        (adapter_file, "adapter="),
        ("tadsr-tny", "did you mean 'tadsr-tiny'"),
        (tmp_path / "absent", r"looked for an embedded one .*hub id"),
    ):
        with pytest.raises(CheckpointError, match=message):
            locate(source)


def test_published_checkpoint(golden_dir, golden_pipeline):
    base_dir, adapter_file = golden_dir / "base", golden_dir / "tadsr.pkl"
    info = inspect_checkpoint(base_dir, adapter_file)
    assert info.format == "official"
    assert (info.rank_unet, info.rank_vae, info.lora_alpha) == (4, 4, 8)
    assert info.timestep_range == (0, 999)
    assert (info.latent_channels, info.scale, info.prompts) == (4, 4, None)
    assert "non-commercial" in info.licence
    by_name = {c.name: c for c in info.components}
    assert list(by_name) == ["vae", "unet", "scheduler", "text_encoder", "tokenizer"]
    assert by_name["unet"].num_parameters == golden_pipeline.unet.num_parameters()
    assert by_name["unet"].dtypes == ("float32",)
    assert by_name["vae"].files == ("time_vae/diffusion_pytorch_model.safetensors",)
    sizes = [(base_dir / f).stat().st_size for c in info.components for f in c.files]
    assert info.num_bytes == sum(sizes) + adapter_file.stat().st_size
    assert info.num_adapter_parameters > 0


def test_native_checkpoint(native):
    info = inspect_checkpoint(native)
    assert info.format == "native"
    assert info.prompts == ("", "sharp")
    assert info.licence == "apache-2.0"
    assert info.adapter_file is None
    assert info.rank_unet is None
    assert info.num_adapter_parameters == 0


def test_variants_are_listed(merged, tmp_path):
    info = inspect_checkpoint(save_native(tmp_path / "m", **merged.components(), variant="fp16"))
    assert {c.variants for c in info.components if c.files} == {("fp16",)}


@pytest.mark.parametrize(
    ("file", "text", "licence"),
    [
        ("README.md", "---\ntags: [x]\nlicense: 'openrail++'\n---\n# Model", "openrail++"),
        ("LICENSE", "\nMIT License\n\nCopyright", "MIT License"),
    ],
)
def test_licence_is_read_from_files(official, file, text, licence):
    (official / file).write_text(text)
    assert inspect_checkpoint(official).licence == licence


def test_damage_is_named(native):
    (native / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(CheckpointError, match="vae/diffusion_pytorch_model"):
        inspect_checkpoint(native)
