import json
from pathlib import Path

import pytest
from safetensors import safe_open


def test_info_is_an_aligned_table(tadsr, model_dir):
    lines = tadsr("info", model_dir).stdout.splitlines()
    facts = dict(line.split(maxsplit=1) for line in lines[: lines.index("")])
    assert facts["format"] == "native"
    assert facts["timesteps"] == "0..999"
    assert facts["adapters"] == "merged"
    assert facts["prompts"] == "none"
    header, *rows = lines[lines.index("") + 1 :]
    assert {row.split()[0] for row in rows} >= {"vae", "unet", "prompt_embeddings", "scheduler"}
    vae = next(row for row in rows if row.startswith("vae"))
    assert vae.index("float32") == header.index("dtype")


def test_info_as_json(tadsr, model_dir):
    found = json.loads(tadsr("info", model_dir, "--json").stdout)
    assert found["format"] == "native"
    assert found["timestep_range"] == [0, 999]
    assert found["num_parameters"] == sum(c["num_parameters"] for c in found["components"])


def test_info_shows_adapters_apart(tadsr, golden_dir):
    result = tadsr("info", golden_dir / "base", "--adapter", golden_dir / "tadsr.pkl")
    assert "official" in result.stdout
    assert "tadsr.pkl (rank " in result.stdout


@pytest.mark.parametrize(
    "command", ["info no-model", "convert no-model out", "export onnx no-model out"]
)
def test_a_model_that_is_not_there_is_one_readable_error(tadsr, command):
    result = tadsr(*command.split(), code=1)
    assert result.stderr.startswith("Error: source must name a checkpoint, got 'no-model'")
    assert result.stdout == ""
    assert not Path("out").exists()


@pytest.mark.parametrize("command", ["convert", "export onnx"])
def test_a_folder_is_replaced_only_when_told(tadsr, model_dir, command):
    Path("out").mkdir()
    Path("out/mine.txt").write_text("keep")
    assert "must be new or empty" in tadsr(*command.split(), model_dir, "out", code=1).stderr
    assert [path.name for path in Path("out").iterdir()] == ["mine.txt"]
    if command == "convert":
        tadsr("convert", model_dir, "out", "--overwrite")
        assert Path("out/model_index.json").is_file()


def test_convert_changes_the_precision(tadsr, model_dir):
    result = tadsr("convert", model_dir, "half", "--dtype", "fp16")
    assert result.stdout.startswith(f"{model_dir} -> half (native, ")
    (weights,) = Path("half/vae").glob("*.safetensors")
    with safe_open(weights, "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118
    assert "exists" not in tadsr("info", "./half").stdout


def test_convert_and_back_computes_the_same(tadsr, base_dir, adapter_file, photo):
    photo("photo.png")
    tadsr("convert", base_dir, "native", "--adapter", adapter_file, "--keep-adapters")
    tadsr("convert", "./native", "back", "--to", "official")
    for name, model in (
        ("a.png", (base_dir, "--adapter", adapter_file)),
        ("b.png", ["./back"]),
    ):
        tadsr("upscale", "photo.png", name, "-m", *model, "--process-size", 0)
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_convert_cannot_split_what_is_merged(tadsr, model_dir):
    assert tadsr("convert", model_dir, "out", "--to", "official", code=1).stderr.startswith("Error")
    assert not Path("out").exists()


def test_a_tagger_is_converted_once_and_loaded_by_its_folder(tadsr, data_dir, tmp_path):
    """The sizes are the published ones here, which the small files do not have."""
    error = tadsr("convert-tagger", data_dir / "tagger", "ram", code=1).stderr
    assert "must hold exactly the tensors of RAM with Swin-L" in error
    options = ("--lists", tmp_path, "--plain")
    error = tadsr("convert-tagger", data_dir / "tagger", "ram", *options, code=1).stderr
    assert "2 of its files are missing" in error
    assert not Path("ram").exists()
