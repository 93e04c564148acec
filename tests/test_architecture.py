"""The laws of the package's structure: what imports what, and how much an import costs."""

import os
import subprocess
import sys
from pathlib import Path

import tadsr

ROOT = Path(__file__).parent.parent
MAX_LINES = 600


def test_imports_point_one_way():
    command = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run(
        [command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


def test_imports_load_nothing_heavy():
    code = "import sys, tadsr; print(*sys.modules)\nimport tadsr.kernels; print(*sys.modules)\n"
    code += "from tadsr.degradation import apply_degradation; print(*sys.modules)\n"
    code += "tadsr.TADSRPipeline.from_pretrained('tadsr-tiny'); print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    bare, kernels, degradation, pipeline = map(str.split, result.stdout.splitlines())
    assert "tadsr" in bare
    assert not {"torch", "triton", "diffusers", "transformers", "PIL", "numpy"} & set(bare)
    assert "tadsr.kernels" in kernels
    assert not {"triton", "diffusers", "PIL"} & set(kernels)
    assert "tadsr.degradation" in degradation
    assert not {"diffusers", "transformers"} & set(degradation)
    assert "tadsr.pipeline" in pipeline
    assert not [m for m in pipeline if m.startswith(("torchvision", "cv2", "tadsr.training"))]
    # Nor the tagger, unless it is asked for.
    assert not [m for m in pipeline if ".swin." in m or m.endswith(".tagger")]


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
