"""The laws of the package's structure: what imports what, what that costs, and public types."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tadsr

ROOT = Path(__file__).parent.parent
MAX_LINES = 500


def run_tool(*command: object) -> str:
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_imports_point_one_way():
    command = Path(sys.executable).with_name("lint-imports")
    assert "0 broken" in run_tool(command, "--no-cache")


@pytest.mark.slow
def test_mypy_knows_the_public_api(tmp_path):
    run_tool(sys.executable, "-m", "mypy", "--warn-unused-ignores", "--cache-dir", tmp_path)


def modules_after(*statements: str) -> list[set[str]]:
    """Return the modules that a process has after each of its statements."""
    code = "\n".join(f"{each}; print(*sys.modules)" for each in ("import sys", *statements))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    return [set(line.split()) for line in result.stdout.splitlines()[1:]]


def test_imports_load_nothing_heavy():
    bare, kernels, degradation = modules_after(
        "import tadsr",
        "import tadsr.kernels",
        "from tadsr.degradation import apply_degradation",
    )
    assert "tadsr" in bare
    assert not {"torch", "triton", "diffusers", "transformers", "PIL", "numpy"} & bare
    assert "tadsr.kernels" in kernels
    assert not {"triton", "diffusers", "PIL"} & kernels
    assert "tadsr.degradation" in degradation
    assert not {"diffusers", "transformers"} & degradation


@pytest.mark.slow
def test_a_pipeline_loads_nothing_that_it_is_not_asked_for():
    (found,) = modules_after("import tadsr; tadsr.TADSRPipeline.from_pretrained('tadsr-tiny')")
    assert "tadsr.pipeline" in found
    assert not [m for m in found if m.startswith(("torchvision", "cv2", "tadsr.training"))]
    assert not [m for m in found if ".swin." in m or m.endswith(".tagger")]


def test_the_public_api_is_complete_and_resolves():
    assert tadsr.__all__ == sorted(tadsr.__all__)
    assert set(tadsr.__all__) >= {
        "ArrayImage", "CheckpointError", "DataError", "FileRequest", "ImageReadError",
        "ImageWriteError", "TADSRError", "TADSRPipeline", "TADSRWarning", "TileSpec",
        "TimeAwareAutoencoderKL", "TimestepMap", "TrainingError", "__version__", "read_frames",
        "read_image", "upscale_folder", "write_frames", "write_image",
    }  # fmt: skip
    for name in tadsr.__all__:
        assert getattr(tadsr, name) is not None
        assert name in dir(tadsr)


def test_no_file_outgrows_a_reader():
    lengths = {p: len(p.read_text().splitlines()) for p in (ROOT / "tadsr").rglob("*.py")}
    assert lengths
    assert {p.name: n for p, n in lengths.items() if n > MAX_LINES} == {}
