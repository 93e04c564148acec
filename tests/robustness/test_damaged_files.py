"""Damaged files end as a picture of the right size or as one of our errors."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import tadsr

SCRIPT = Path(__file__).with_name("damaged_files.py")
SEED = 0
QUICK, LONG = 100, 6000
"""The long run begins with the cases of the quick one."""
_MOST_FAILURES = 10


def run_cases(model: Path, folder: Path, seed: int, count: int) -> list[dict[str, str]]:
    """Run cases in processes of their own; one that is brought down is followed by another."""
    paths = [str(Path(tadsr.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    found: list[dict[str, str]] = []
    while len(found) < count and sum(bool(case["wrong"]) for case in found) < _MOST_FAILURES:
        first = len(found)
        command = [sys.executable, SCRIPT, "--model", model, "--folder", folder, "--seed", seed]
        command += ["--first", first, "--count", count - first]
        done = subprocess.run(
            list(map(str, command)), env=environment, capture_output=True, text=True
        )
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        found += lines
        if done.returncode == 0:
            break
        assert lines or (folder / "in").exists(), done.stderr  # it did not even begin
        wrong = f"the process ended with {done.returncode}:\n{done.stderr[-3000:]}"
        found.append({"number": len(found), "became": "dead", "wrong": wrong})
    return found


@pytest.mark.parametrize("count", [QUICK, pytest.param(LONG, marks=pytest.mark.slow)])
def test_damaged_files_are_upscaled_or_refused(count, model_dir, tmp_path):
    cases = run_cases(model_dir, tmp_path, SEED, count)
    failures = [case for case in cases if case["wrong"]]
    report = "\n\n".join(f"case {case['number']}: {case['wrong']}" for case in failures)
    assert not failures, (
        f"{report}\n\nThe files are in {tmp_path / 'in'}; `python {SCRIPT} --model MODEL "
        f"--folder EMPTY --seed {SEED} --first NUMBER` runs a case again"
    )
    counts = Counter(case["became"] for case in cases)
    assert len(cases) == count
    # Neither the one nor the other alone would show anything.
    assert min(counts["upscaled"], counts["ImageReadError"]) > len(cases) / 20, counts
