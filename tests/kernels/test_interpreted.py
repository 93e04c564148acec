"""The parity tests with Triton's interpreter, in a process where nothing else is interpreted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
MIN_TESTS = 80


def test_kernels_agree_with_their_references_when_interpreted():
    tests = Path(__file__).with_name("test_parity.py")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", tests, "-p", "no:cacheprovider"],
        cwd=tests.parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None
    assert int(passed[1]) >= MIN_TESTS
