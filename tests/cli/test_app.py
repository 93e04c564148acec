"""The program as a process: what it imports, completes and suggests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tadsr as package
from tadsr.cli import SPINS, main

# What the tests import is what the processes run, installed or not.
ENVIRONMENT = {
    "PYTHONPATH": str(Path(package.__file__).parents[1]),
    "PYTHONIOENCODING": "utf-8",
    "OMP_NUM_THREADS": "1",
}
BEFORE_CUDA = ["diffusers"] if torch.version.cuda or torch.version.hip else ["torch"]
CHEAP = [
    ("--help", ["torch", "PIL"], 0),
    ("-V", ["torch", "PIL"], 0),
    ("upscale --help", ["torch", "PIL"], 0),
    ("upscal", ["torch", "PIL"], 2),
    ("upscale photo.jpg -m tadsr-tny", ["torch"], 1),
    ("upscale photo.jpg --adapter missing.pkl", ["torch"], 1),
    ("upscale photo.jpg photo.jpg.png", ["torch"], 0),  # exists
    ("upscale photo.jpg --device gpu", ["torch"], 2),
    ("upscale photo.jpg --device cuda:99", BEFORE_CUDA, 2),
    ("sweep photo.jpg -m tadsr-tny", ["torch"], 1),
    ("evaluate --lq . -m tadsr-tny", ["torch"], 1),
    ("info tadsr-tny", ["torch"], 1),
]
UPSCALE = "upscale photo.jpg --process-size 0 -m "
HEAVY = ["diffusers", "transformers", "peft", "accelerate", "scipy", "torch._dynamo"]
EACH_COMMAND = """
import json, os, sys
from tadsr.cli import main

for words, heavy in json.loads(sys.argv[1]):
    sys.stdout.flush()
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(writing, 2)
        sys.argv = ["tadsr", *words.split()]
        try:
            main()
        finally:
            print(*set(heavy) & set(sys.modules), file=sys.stderr)
    os.close(writing)
    said = os.fdopen(reading).read()
    print(json.dumps([os.waitstatus_to_exitcode(os.wait()[1]), said]))
"""


def run(*args: object, cwd=None, **more: str) -> subprocess.CompletedProcess:
    command, environment = [sys.executable, *map(str, args)], os.environ | ENVIRONMENT | more
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8"
    )


@pytest.mark.parametrize("policy", [None, "active"])
def test_threads_sleep_when_they_have_nothing_to_do_unless_told_otherwise(monkeypatch, policy):
    for name, value in (("GOMP_SPINCOUNT", None), ("OMP_WAIT_POLICY", policy)):
        monkeypatch.setenv(name, "to be put back")
        monkeypatch.delenv(name)
        if value is not None:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["tadsr", "--version"])
    with pytest.raises(SystemExit):
        main()
    assert os.environ.get("GOMP_SPINCOUNT") == (SPINS if policy is None else None)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_cheap_answers_come_before_heavy_imports_and_a_picture_without_chatter(
    tmp_path, photo, model_dir
):
    photo("photo.jpg")
    photo("photo.jpg.png", (24, 20))  # as a result of it
    cases = [*CHEAP, (f"{UPSCALE}{model_dir}", HEAVY, 0)]
    asked = json.dumps([(words, heavy) for words, heavy, _ in cases])
    result = run("-c", EACH_COMMAND, asked, cwd=tmp_path)
    found = [json.loads(line) for line in result.stdout.splitlines()]
    for (words, _, code), (found_code, said) in zip(cases, found, strict=True):
        assert found_code == code, (words, said)
        assert said.splitlines()[-1] == "", words  # nothing heavy
    assert found[-1][1] == "on cpu, float32, engine fused\n\n"
    assert (tmp_path / "photo_x4.png").is_file()


def test_version_and_module_entry():
    result = run("-m", "tadsr", "--version")
    assert (result.returncode, result.stdout) == (0, f"tadsr {package.__version__}\n")


@pytest.mark.parametrize(
    ("args", "suggestion"),
    [
        ("upscal photo.jpg", "Did you mean 'upscale'?"),
        ("cnvert", "Did you mean 'convert'"),
        ("photo.jpg", "Did you mean 'tadsr upscale photo.jpg'?"),
        ("upscale photo.jpg --overwite", "Did you mean --overwrite"),
        ("upscale photo.jpg --out", "Did you mean --output?"),
        ("upscale photos/*.gif", "but no file has a name of that kind"),
        ("webui", "Did you mean 'tadsr demo'?"),
        ("demo --listen", "--host 0.0.0.0"),
        ("onnx tadsr-tiny", "Did you mean 'tadsr export onnx'?"),
        ("version", "Did you mean 'tadsr --version'?"),
        ("enhance photo.jpg", "Did you mean 'tadsr upscale'?"),
        ("info x --jsn", "Did you mean --json?"),
        ("--verson", "Did you mean --version?"),
        ("-v upscale photo.jpg", "-v comes after the command, as in tadsr upscale -v"),
    ],
)
def test_typos_get_a_suggestion(tadsr, args, suggestion):
    assert suggestion in tadsr(*args.split(), code=2).stderr


def test_shells_complete_commands_and_options():
    words = {"COMP_WORDS": "tadsr upscale --over", "COMP_CWORD": "2"}
    program = "from tadsr.cli import main; main()"
    result = run("-c", program, **words, _TADSR_COMPLETE="complete_bash")
    assert result.stdout.split() == ["--overwrite"], result.stderr


def test_help_lists_examples(tadsr):
    assert "tadsr upscale photo.jpg " in tadsr("--help").stdout
    for command in ("upscale", "info", "convert"):
        assert "Examples:" in tadsr(command, "--help").stdout
