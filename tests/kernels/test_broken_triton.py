"""Triton that is installed and does not work: the picture is right, and one warning says why.

The quick run has the same on a device that is pretended, in tests/pretend/test_calls.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = """
import os
import warnings
from unittest import mock

import numpy as np
from triton.backends import backends

from tadsr import TADSRPipeline
from tadsr.onestep import EnginePlan
from tadsr.kernels import backends as dispatch
from tadsr.kernels.gpu import geglu, group_norm, images, statistics

photo = np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)
pipe = TADSRPipeline.from_pretrained("tadsr-tiny", engine="eager")
expected = pipe(photo, process_size=0).astype(int)

# As beside a GPU: the kernels were made to be compiled, and may be launched.
backends["nvidia"].driver.is_active = staticmethod(lambda: True)
has_cuda = {"TRITON_INTERPRET": "1", "TRITON_LIBCUDA_PATH": "/nowhere"}
ways = {  # in this order: Triton keeps what it has found
    "AssertionError: libcuda": {"TRITON_INTERPRET": "1"},
    "RuntimeError: Failed to find C compiler": has_cuda | {"PATH": "/nowhere"},
    "CalledProcessError: Command '['false'": has_cuda | {"CC": "false"},
}
for reason, environment in ways.items():
    dispatch._failures.clear()
    with mock.patch.dict(os.environ, environment), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for engine in ("eager", "auto", EnginePlan(fused_kernels=True)):
            pipe.set_engine(engine)
            for color_fix in ("wavelet", "none", "adain"):
                found = pipe(photo, process_size=0, color_fix=color_fix)
            assert np.abs(found - expected).max() <= 1
    (message,) = [str(warning.message) for warning in caught]
    assert message.startswith(f"the fused kernels do not run on cpu ({reason}"), message
"""


@pytest.mark.slow
def test_a_broken_triton_is_replaced_with_one_warning(tmp_path):
    removed = {"CC", "TRITON_INTERPRET", "TADSR_KERNELS", "TRITON_LIBCUDA_PATH"}
    environment = {name: value for name, value in os.environ.items() if name not in removed}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
