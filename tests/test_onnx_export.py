"""The exported graphs compute what the pipeline does, in another runtime and at any size."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from tadsr import TADSRError, TADSRPipeline, cli, onnx_export
from tadsr.errors import CheckpointError
from tadsr.networks.prompt_embeddings import PromptEmbeddings
from tadsr.onnx_export import export_onnx
from tests.small_models import pipeline_of, small_unet, small_vae

TOLERANCE = 1e-4
"""Largest difference over the largest value; measured, 1e-5 at most."""


class Exported:
    """The three graphs of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sessions = {
            path.stem: onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            for path in folder.glob("*.onnx")
        }

    def __call__(self, stage: str, **inputs: torch.Tensor) -> torch.Tensor:
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        return torch.from_numpy(self.sessions[stage].run(None, arrays)[0])


@pytest.fixture(scope="module")
def pipe():
    """A model that attends in the middle only: an export takes its time by the layer."""
    plain = {
        "down_block_types": ["DownBlock2D"] * 2,
        "up_block_types": ["UpBlock2D"] * 2,
    }
    torch.manual_seed(0)
    vae = small_vae((4, 4), norm_num_groups=2, mid_block_add_attention=False)
    return pipeline_of(vae, small_unet(**plain), PromptEmbeddings(embedding_dim=8))


def run_command(words, said):
    sys.argv = ["tadsr", *words]
    with said.open("w") as sys.stdout:
        sys.stderr = sys.stdout
        cli.main()


def check_parity(pipe, exported, batch, height, width, timestep):
    factor = pipe.vae.downscale_factor
    generator = torch.Generator().manual_seed(batch + height + width)
    lq = torch.rand(batch, 3, factor * height, factor * width, generator=generator) * 2 - 1
    timesteps = torch.full((batch,), timestep)
    prompt_embeds = pipe.encode_prompt([""] * batch).contiguous()
    with torch.no_grad():
        latents = pipe.encode_latents(lq, timesteps)
        pred_x0 = pipe.predict_x0(latents, timesteps, prompt_embeds)
        image = pipe.decode_latents(pred_x0)
    found = {
        "encoder": (exported("encoder", lq=lq, timestep=timesteps), latents),
        "unet": (
            exported("unet", latents=latents, timestep=timesteps, prompt_embeds=prompt_embeds),
            pred_x0,
        ),
        "decoder": (exported("decoder", latents=pred_x0), image),
    }
    for stage, (result, expected) in found.items():
        assert result.shape == expected.shape
        error = (result - expected).abs().max() / expected.abs().max()
        assert error <= TOLERANCE, (stage, error)


def check_description(pipe, exported):
    description = json.loads((exported.folder / "onnx.json").read_text())
    assert description["format"] == "tadsr-onnx-1"
    assert description["size_multiple"] == pipe.vae.downscale_factor
    assert description["num_timesteps"] == 1000
    for file, stage in description["stages"].items():
        session = exported.sessions[file.removesuffix(".onnx")]
        for kind, values in (
            ("inputs", session.get_inputs()),
            ("outputs", session.get_outputs()),
        ):
            assert [v.name for v in values] == list(stage[kind])
            for value in values:
                told = stage[kind][value.name]
                assert len(value.shape) == len(told)
                fixed = [size for size in told if isinstance(size, int)]
                assert [size for size in value.shape if isinstance(size, int)] == fixed
    empty = np.load(exported.folder / description["empty_prompt"])
    np.testing.assert_array_equal(empty, pipe.encode_prompt([""]).numpy())


# Powers of two, odd sides, one row, batches, and more images than were traced for.
SIZES = [(1, 8, 8), (2, 5, 7), (1, 1, 9), (3, 12, 6), (65, 2, 2)]


@pytest.mark.parametrize("name", ["small", pytest.param("tadsr-tiny", marks=pytest.mark.slow)])
def test_a_model_exported_from_the_shell_agrees_with_the_pipeline(name, pipe, imported, tmp_path):
    # All in one test, as an export takes a quarter of a minute, and in a process of its own: after
    # all other tests torch.export failed in theirs.
    model, folder, said = name, tmp_path / "onnx", tmp_path / "said.txt"
    if name == "small":
        model = str(tmp_path / "model")
        pipe.save_pretrained(model)
    words = ["export", "onnx", model, str(folder)]
    process = imported.Process(target=run_command, args=(words, said))
    process.start()
    process.join()
    assert process.exitcode == 0, said.read_text()
    assert f"{model} -> {folder} (onnx, " in said.read_text()
    pipe, exported = TADSRPipeline.from_pretrained(model), Exported(folder)
    for size in SIZES:
        # A graph takes all sizes alike; the slow case tries every pair.
        for timestep in (500,) if name == "small" and size != SIZES[1] else (0, 500, 999):
            check_parity(pipe, exported, *size, timestep)
    check_description(pipe, exported)


@pytest.mark.slow
def test_a_model_of_stable_diffusions_layout_agrees_too(golden_pipeline, tmp_path):
    exported = Exported(export_onnx(golden_pipeline, tmp_path / "golden"))
    for size in (*SIZES, (1, 33, 64)):
        check_parity(golden_pipeline, exported, *size, 500)


def test_the_model_is_left_as_it_was(pipe):
    # A second export would fail if it were not, and results would be other ones.
    with onnx_export.any_size(pipe.unet):
        assert pipe.unet.num_upsamplers > 10
    assert pipe.unet.num_upsamplers == len(pipe.unet.config.up_block_types) - 1


def test_a_folder_in_use_is_left_alone(pipe, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="must be new or empty"):
        export_onnx(pipe, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_nothing_is_left_where_a_stage_fails(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "_MAX_TRACED_SIDE", 18)  # less than the example has
    with pytest.raises(TADSRError, match="encoder cannot be exported to ONNX"):
        export_onnx(pipe, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_adapters_apart_and_half_precision_are_refused(unmerged_pipeline, tmp_path):
    with pytest.raises(ValueError, match="merge_adapters"):
        export_onnx(unmerged_pipeline, tmp_path / "a")
    half = TADSRPipeline.from_pretrained("tadsr-tiny", torch_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="must be in float32"):
        export_onnx(half, tmp_path / "a")


def test_missing_libraries_are_named(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "_LIBRARIES", ("onnx", "no_such_library"))
    with pytest.raises(TADSRError, match=r"needs no_such_library; .*tadsr\[onnx\]"):
        export_onnx(pipe, tmp_path / "a")
