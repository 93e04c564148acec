"""The engine with interpreted Triton kernels, in a process where nothing else is interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = """
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tadsr import TADSRPipeline
from tadsr.engine import EnginePlan
from tadsr.kernels.gpu import launch

folder = Path(sys.argv[1])
golden = load_file(folder / "golden.safetensors")
launches = []
run = launch.Launch.__init__
def count(self, *arguments, **options):
    launches.append(1)
    run(self, *arguments, **options)
launch.Launch.__init__ = count

pipe = TADSRPipeline.from_pretrained(folder / "base", adapter=folder / "tadsr.pkl")
pipe.set_engine(EnginePlan(fused_kernels=True))
timestep, prompt = int(sys.argv[2]), sys.argv[3]
image = pipe.restore(golden["0.lq"], torch.tensor([timestep]), pipe.encode_prompt([prompt]))
torch.testing.assert_close(image, golden["0.mode.image"], atol=2e-4, rtol=0)
print(len(launches))
"""


def test_published_figures_with_interpreted_kernels(golden_dir, golden_cases):
    _, _, timestep, prompt = golden_cases[0]
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, golden_dir, str(timestep), prompt],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert int(result.stdout) > 100
