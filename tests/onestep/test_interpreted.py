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

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from tadsr import TADSRPipeline
from tadsr.onestep import EnginePlan
from tadsr.kernels.gpu import launch

folder = Path(sys.argv[1])
golden = load_file(folder / "golden.safetensors")
launches = []
run = launch.Launch.__init__
def count(self, kernel, *arguments, **options):
    launches.append(kernel.fn.__name__)
    run(self, kernel, *arguments, **options)
launch.Launch.__init__ = count

pipe = TADSRPipeline.from_pretrained(folder / "base", adapter=folder / "tadsr.pkl")
pipe.set_engine(EnginePlan(fused_kernels=True))
timestep, prompt = int(sys.argv[2]), sys.argv[3]
image = pipe.restore(golden["0.lq"], torch.tensor([timestep]), pipe.encode_prompt([prompt]))
torch.testing.assert_close(image, golden["0.mode.image"], atol=2e-4, rtol=0)

planes = [Image.effect_noise((40, 24), sigma) for sigma in (60, 90, 120)]
photo = Image.merge("RGB", planes).resize((20, 12))
options = {"timestep": timestep, "prompt": prompt, "process_size": 0}
ends = {"adain": "adain_kernel", "wavelet": "wavelet_level_kernel", "none": "to_uint8_kernel"}
for color_fix, last in ends.items():
    floats = pipe(photo, color_fix=color_fix, output_type="pt", **options)
    assert launches[-1] != last
    pixels = np.asarray(pipe(photo, color_fix=color_fix, **options))
    assert launches[-1] == last
    assert np.abs(pixels - floats.permute(1, 2, 0).numpy() * 255).max() < 0.51
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
