"""Damaged files end as a picture of the right size or as one of our errors."""

import json
import os
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from .damaged_files import run_numbered

SEED = 0
QUICK, LONG = 60, 6000
"""The long run begins with the cases of the quick one."""
_MOST_FAILURES = 10


def run_cases(model: Path, folder: Path, count: int) -> list[dict[str, Any]]:
    """Run cases in processes of their own; one that is brought down is followed by another."""
    told, errors = folder / "cases.jsonl", folder / "errors.txt"
    found: list[dict[str, Any]] = []
    while len(found) < count and sum(bool(case["wrong"]) for case in found) < _MOST_FAILURES:
        first = len(found)
        told.unlink(missing_ok=True)
        status = run_forked(errors, model, folder, SEED, first, count - first, told)
        lines = told.read_text().splitlines() if told.exists() else []
        found += map(json.loads, lines)
        if status == 0:
            break
        assert lines or (folder / "in").exists(), errors.read_text()  # it did not even begin
        wrong = f"the process ended with {status}:\n{errors.read_text()[-3000:]}"
        found.append({"number": len(found), "became": "dead", "wrong": wrong})
    return found


def run_forked(errors: Path, *arguments: Any) -> int:
    """Run cases in a process that need not import again; return its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        with errors.open("w") as sys.stderr:
            os.dup2(sys.stderr.fileno(), 2)
            try:
                run_numbered(*arguments)
                status = 0
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(status)


@pytest.mark.parametrize("count", [QUICK, pytest.param(LONG, marks=pytest.mark.slow)])
def test_damaged_files_are_upscaled_or_refused(count, model_dir, tmp_path):
    cases = run_cases(model_dir, tmp_path, count)
    failures = [case for case in cases if case["wrong"]]
    report = "\n\n".join(f"case {case['number']}: {case['wrong']}" for case in failures)
    assert not failures, (
        f"{report}\n\nThe files are in {tmp_path / 'in'}; `run_numbered` with seed {SEED}, the "
        "case's number and a count of 1 runs it again"
    )
    counts = Counter(case["became"] for case in cases)
    assert len(cases) == count
    # Neither the one nor the other alone would show anything.
    assert min(counts["upscaled"], counts["ImageReadError"]) > len(cases) / 20, counts
