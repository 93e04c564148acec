"""Training's losses on a GPU that is not there; gradients would need a real one."""

import copy
import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tadsr.training import DataConfig, DistillationConfig, TimestepRamp, TrainingConfig
from tadsr.training.data.samples import Batch
from tadsr.training.randomness import SampleRandomness
from tadsr.training.stages.build import build_stage
from tadsr.training.stages.stage import Runtime, Stage

MAX_LAUNCHES = 8600
"""Kernels of a step's losses, two samples with teacher and fake score, without gradients."""


@pytest.fixture(scope="module")
def stage(golden_dir, tmp_path_factory) -> Stage:
    output = tmp_path_factory.mktemp("run")
    model = output / "base"
    shutil.copytree(golden_dir / "base", model)
    shutil.copyfile(golden_dir / "tadsr.pkl", model / "tadsr.pkl")
    distillation = DistillationConfig(perceptual="none", perceptual_weight=TimestepRamp(0, 0))
    config = TrainingConfig(
        model=str(model),
        output=str(output),
        stage=distillation,
        data=DataConfig(str(output), crop_px=64, num_workers=0),
    )
    return build_stage(config, output)


def values_of(losses: dict[str, Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in losses.items()}


def start(stage: Stage, device: str) -> Callable[[], dict[str, Tensor]]:
    """Put a stage on a device; return what computes the losses of a step there."""
    generator = torch.Generator().manual_seed(0)
    hq, lq = (torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1 for _ in range(2))
    batch = Batch(hq, lq, ("", "a cat"), torch.tensor([3, 4]), None, ("a", "b"), ()).to(device)
    for module in (*stage.frozen(), *(network.module for network in stage.networks.values())):
        module.to(device)
    models = {name: network.module for name, network in stage.networks.items()}
    stage.start(Runtime(torch.device(device), models=models))

    def step() -> dict[str, Tensor]:
        randomness = SampleRandomness(0, batch.indices, device)
        return {
            f"{phase.network} {name}": value
            for phase in stage.phases(batch, 0, randomness)
            for name, value in phase.losses.items()
        }

    return step


@pytest.mark.slow
def test_losses_are_those_of_the_cpu_and_wait_for_nothing(stage, pretend):
    expected = values_of(start(copy.deepcopy(stage), "cpu")())
    assert len(expected) >= 4
    with pretend() as device:
        step = start(stage, "cuda")
        assert values_of(step()) == pytest.approx(expected, rel=1e-3)
        device.forget()
        losses = step()
        assert device.waits == []
        assert sum(device.launches.values()) <= MAX_LAUNCHES, device.launches
        assert torch.stack([*losses.values()]).isfinite().all()
