"""Killed runs go on to the bit, and processes share the work without changing it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tadsr.training import Trainer, load_recipe

ROOT = Path(__file__).parents[2]
STEPS = 12
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def recipe(networks, photos, tmp_path_factory):
    """A distillation with every network: student, fake score and discriminator."""
    folder = tmp_path_factory.mktemp("recipe")
    teacher = folder / "teacher.yaml"
    quick = {"learning_rate": 2e-3, "warmup_steps": 1}
    shared = {
        "model": str(networks),
        "data": {"source": str(photos), "crop_px": 32, "num_workers": 1},
        "optimizer": quick,
        "batch_size": 2,
        "log_every": 1,
        "save_every": 3,
        "device": "cpu",
    }
    teacher.write_text(
        yaml.safe_dump(shared | {"output": "o", "stage": {"kind": "teacher"}, "steps": 1})
    )
    Trainer(load_recipe(teacher, {"output": str(folder / "teacher")})).train()
    stage = {
        "teacher": str(folder / "teacher" / "model"),
        "adapter_rank": 0,
        "perceptual_weight": 0,
        "gan_weight": 0.1,
        "negative_prompt": "degraded photo",
        "fake_score_optimizer": quick,
        "discriminator_optimizer": quick,
    }
    path = folder / "student.yaml"
    path.write_text(yaml.safe_dump(shared | {"stage": stage, "steps": STEPS, "ema_decay": 0.9}))
    return path


def command(recipe, output, *options):
    return [sys.executable, "-m", "tadsr", "train", "-c", str(recipe), "-o", str(output), *options]


def run_cli(recipe, output, *options, launcher=()):
    line = command(recipe, output, *options)
    if launcher:
        line = [*launcher, *line[1:]]
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def read_losses(output):
    lines = [json.loads(s) for s in (output / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "loss" in k or "norm" in k} for line in lines]


def test_a_killed_run_repeats_the_uninterrupted_one_to_the_bit(recipe, tmp_path):
    run_cli(recipe, tmp_path / "whole")
    killed = subprocess.Popen(
        command(recipe, tmp_path / "killed"),
        env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    log = tmp_path / "killed" / "log.jsonl"
    while not log.is_file() or len(log.read_text().splitlines()) < 5:
        assert killed.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "model").exists()
    run_cli(recipe, tmp_path / "killed")

    whole, again = read_losses(tmp_path / "whole"), read_losses(tmp_path / "killed")
    assert len(whole) == STEPS
    assert whole == again
    last = f"checkpoints/step_{STEPS:08d}"
    for name in ("student", "fake_score", "discriminator", "average"):
        expect = load_file(tmp_path / "whole" / last / f"{name}.safetensors")
        got = load_file(tmp_path / "killed" / last / f"{name}.safetensors")
        assert all(tensor.equal(got[key]) for key, tensor in expect.items()), name


def test_two_processes_train_as_one_of_the_doubled_batch(recipe, tmp_path):
    # Without the discriminator: Adam turns rounding into whole steps where gradients vanish.
    options = ("--set", "steps=4", "--set", "stage.gan_weight=0")
    # Accelerate starts processes by torchrun for --multi_gpu only; the recipe keeps them on the
    # CPU, where they talk through gloo.
    launcher = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", "0",
    ]  # fmt: skip
    run_cli(recipe, tmp_path / "two", *options, "--batch-size", "1", launcher=launcher)
    run_cli(recipe, tmp_path / "one", *options, "--batch-size", "2")
    card = (tmp_path / "two" / "model" / "README.md").read_text()
    assert "4 steps, 8 samples" in card  # by two processes indeed
    for name in ("student", "fake_score"):
        path = f"checkpoints/step_00000004/{name}.safetensors"
        expect, got = load_file(tmp_path / "one" / path), load_file(tmp_path / "two" / path)
        for key, tensor in expect.items():
            torch.testing.assert_close(got[key], tensor, atol=2e-5, rtol=1e-3, msg=key)
    for one, two in zip(read_losses(tmp_path / "one"), read_losses(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-3)
