"""A type checker knows what the public names take and give."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_mypy_knows_the_public_api(tmp_path):
    command = [sys.executable, "-m", "mypy", "--warn-unused-ignores", "--cache-dir", tmp_path]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
