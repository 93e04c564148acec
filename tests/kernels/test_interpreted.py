"""Tests of kernels with Triton's interpreter, in a process where nothing else is interpreted."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
TESTS = ("kernels/test_parity.py", "onestep/test_kernels.py")


@pytest.mark.parametrize(
    ("kind", "min_tests"),
    [("not slow and not gpu", 70), pytest.param("slow and not gpu", 50, marks=pytest.mark.slow)],
)
def test_kernels_agree_with_their_references_when_interpreted(kind, min_tests):
    tests = [Path(__file__).parents[1] / name for name in TESTS]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *tests, "-p", "no:cacheprovider", "-m", kind],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None
    assert int(passed[1]) >= min_tests
