"""`tadsr doctor` on a machine without a GPU; tests/pretend has it beside one."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from tadsr.doctor import check_all
from tadsr.machine import recall, remember


def test_it_says_what_runs_and_what_does_not(tadsr):
    lines = tadsr("doctor").stdout.splitlines()
    facts = dict(line.split(maxsplit=1) for line in lines)
    assert facts["torch"] == torch.__version__
    assert facts["device"].startswith("cpu: ")
    assert facts["dtype"] == "float32"
    assert facts["products"].startswith(("float32; ", "bfloat16; a convolution in bfloat16 takes "))
    assert facts["engine"] == "auto takes fused"
    assert facts["kernels"].startswith("not used: ")
    assert facts["ok"].startswith("model tadsr-tiny: 8 files match their hashes")


def test_json_is_for_bug_reports(tadsr, model_dir):
    report = json.loads(tadsr("doctor", "-m", model_dir, "--dtype", "bf16", "--json").stdout)
    assert report["is_right"] is True
    assert report["dtype"] == "bfloat16"
    assert report["kernel_reasons"]
    assert "no hashes" in report["model"]["detail"]
    assert report["checks"] == []


def test_a_damaged_model_is_found(tadsr, model_dir, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    (weights,) = (folder / "unet").glob("*.safetensors")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    name = weights.relative_to(folder).as_posix()
    (folder / "SHA256SUMS").write_text(f"{digest}  {name}\n")
    assert "ok     model" in tadsr("doctor", "-m", folder).stdout
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert f"WRONG  model {folder}: damaged: {name}" in tadsr("doctor", "-m", folder, code=1).stdout
    weights.unlink()
    assert "WRONG  model" in tadsr("doctor", "-m", folder, code=1).stdout


@pytest.mark.slow
def test_engines_are_checked_and_timed_in_processes_of_their_own(tadsr, model_dir):
    result = tadsr("doctor", "-m", model_dir, "--check", "--speed", "--json")
    report = json.loads(result.stdout)
    checks = {one["name"]: one["is_right"] for one in report["checks"]}
    assert checks["engine eager"] is checks["engine fused"] is True
    assert {checks[name] for name in checks if name.startswith("kernel")} == {None}
    speeds = {one["name"]: one for one in report["speeds"]}
    assert speeds["engine fused"]["seconds"] > 0
    assert speeds["engine compile"]["is_right"] is None
    assert "takes from now on" in speeds["fastest"]["detail"]


CHILD = """#!{python}
import json, os, signal, sys
name = sys.argv[7]
print(json.dumps({{"name": name, "is_right": True, "detail": ""}}), flush=True)
os.kill(os.getpid(), signal.SIGSEGV)
"""


def test_what_kills_a_process_is_wrong_and_the_rest_goes_on(tmp_path, monkeypatch):
    child = tmp_path / "child"
    child.write_text(CHILD.format(python=sys.executable))
    child.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(child))
    found = list(check_all("tadsr-tiny", torch.device("cpu"), torch.float32))
    assert {one.is_right for one in found[::2]} == {True}
    assert {one.is_right for one in found[1::2]} == {False}
    assert "its process ended with -11" in found[1].detail


def test_findings_survive_what_else_is_in_their_file(tmp_path, monkeypatch):
    monkeypatch.setenv("TADSR_CACHE", str(tmp_path / "cache"))
    assert recall("trusted", "a") is None
    remember("trusted", "a", True)
    remember("fastest", "a", "eager")
    assert (recall("trusted", "a"), recall("fastest", "a")) == (True, "eager")
    (Path(tmp_path) / "cache" / "machine.json").write_text("[1")
    assert recall("trusted", "a") is None
    monkeypatch.setenv("TADSR_CACHE", "/dev/null/closed")
    remember("trusted", "a", True)  # nothing to write to is no reason to fail
