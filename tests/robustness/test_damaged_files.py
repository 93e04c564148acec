"""Damaged files end as a picture of the right size or as one of our errors."""

import importlib
import json
import os
import sys
import traceback
from collections import Counter
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("damaged_files.py")
SEED = 0
QUICK, LONG = 100, 6000
"""The long run begins with the cases of the quick one."""
_MOST_FAILURES = 10


def run_cases(model: Path, folder: Path, seed: int, count: int) -> list[dict[str, str]]:
    """Run cases in processes of their own; one that is brought down is followed by another."""
    output, errors = folder / "cases.jsonl", folder / "errors.txt"
    found: list[dict[str, str]] = []
    while len(found) < count and sum(bool(case["wrong"]) for case in found) < _MOST_FAILURES:
        first = len(found)
        words = ["--model", model, "--folder", folder, "--seed", seed]
        words += ["--first", first, "--count", count - first]
        status = run_forked(list(map(str, words)), output, errors)
        lines = [json.loads(line) for line in output.read_text().splitlines()]
        found += lines
        if status == 0:
            break
        assert lines or (folder / "in").exists(), errors.read_text()  # it did not even begin
        wrong = f"the process ended with {status}:\n{errors.read_text()[-3000:]}"
        found.append({"number": len(found), "became": "dead", "wrong": wrong})
    return found


def run_forked(words: list[str], output: Path, errors: Path) -> int:
    """Run the script in a process that need not import again; return its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        with output.open("w") as sys.stdout, errors.open("w") as sys.stderr:
            os.dup2(sys.stderr.fileno(), 2)
            sys.path.insert(0, str(SCRIPT.parent))
            try:
                importlib.import_module(SCRIPT.stem).main(words)
                status = 0
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(status)


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
