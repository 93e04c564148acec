"""Killed runs go on to the bit, and processes share the work without changing it."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tadsr.training import Trainer, load_recipe

STEPS = 6


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums are rounded in the order of the threads
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def recipe(networks, photos, tmp_path_factory):
    """A distillation with every network: student, fake score and discriminator."""
    folder = tmp_path_factory.mktemp("recipe")
    teacher = folder / "teacher.yaml"
    quick = {"learning_rate": 2e-3, "warmup_steps": 1}
    shared = {
        "model": str(networks),
        "data": {"source": str(photos), "crop_px": 32, "num_workers": 1},
        "optimizer": quick | {"muon_learning_rate": 2e-3},
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


def train(recipe: Path, output: Path, changes: dict, environment: dict) -> None:
    """Train in this process, or in one of its own."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    Trainer(load_recipe(recipe, changes | {"output": str(output)})).train()


def train_until_killed(recipe: Path, output: Path) -> None:
    os.setsid()  # so that its worker can be killed with it
    log = output / "log.jsonl"

    def kill() -> None:
        while not log.is_file() or len(log.read_text().splitlines()) < 4:
            time.sleep(0.01)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    train(recipe, output, {}, {})


def read_losses(output):
    lines = [json.loads(s) for s in (output / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "loss" in k or "norm" in k} for line in lines]


def test_a_killed_run_repeats_the_uninterrupted_one_to_the_bit(recipe, imported, tmp_path):
    killed = imported.Process(target=train_until_killed, args=(recipe, tmp_path / "killed"))
    killed.start()
    train(recipe, tmp_path / "whole", {}, {})
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "model").exists()
    train(recipe, tmp_path / "killed", {}, {})

    whole, again = read_losses(tmp_path / "whole"), read_losses(tmp_path / "killed")
    assert len(whole) == STEPS
    assert whole == again
    last = f"checkpoints/step_{STEPS:08d}"
    for name in ("student", "fake_score", "discriminator", "average"):
        expect = load_file(tmp_path / "whole" / last / f"{name}.safetensors")
        got = load_file(tmp_path / "killed" / last / f"{name}.safetensors")
        assert all(tensor.equal(got[key]) for key, tensor in expect.items()), name


def test_two_processes_train_as_one_of_the_doubled_batch(recipe, imported, tmp_path):
    # Without what turns rounding into whole steps where gradients vanish.
    changes = {"steps": 4, "stage.gan_weight": 0, "optimizer.muon_learning_rate": None}
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    # As torchrun and `accelerate launch` start them; on the CPU they talk through gloo.
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        imported.Process(
            target=train,
            args=(
                *(recipe, tmp_path / "two", changes | {"batch_size": 1}),
                shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            ),
        )
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    train(recipe, tmp_path / "one", changes | {"batch_size": 2}, {})
    for process in ranks:
        process.join()
        assert process.exitcode == 0
    card = (tmp_path / "two" / "model" / "README.md").read_text()
    assert "4 steps, 8 samples" in card  # by two processes indeed
    for name in ("student", "fake_score"):
        path = f"checkpoints/step_00000004/{name}.safetensors"
        expect, got = load_file(tmp_path / "one" / path), load_file(tmp_path / "two" / path)
        for key, tensor in expect.items():
            torch.testing.assert_close(got[key], tensor, atol=2e-5, rtol=1e-3, msg=key)
    for one, two in zip(read_losses(tmp_path / "one"), read_losses(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-3)
