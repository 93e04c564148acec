"""Muon's steps, against torch's own where it has them."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from tadsr.training import OptimizerConfig, optimization
from tadsr.training.optimization import Muon, Optimizers, is_kernel, orthogonalize
from tadsr.training.stages.stage import TrainedNetwork


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (16, 16)])
def test_directions_become_equally_long(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    after = torch.linalg.svdvals(orthogonalize(matrix))
    assert after.min() > 0.6
    assert after.max() < 1.3
    torch.testing.assert_close(orthogonalize(100 * matrix), orthogonalize(matrix))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_steps_are_those_of_torch():
    generator = torch.Generator().manual_seed(0)
    ours = nn.Parameter(torch.randn(12, 5, 3, 3, generator=generator))
    theirs = nn.Parameter(ours.detach().flatten(1).clone())
    muon = Muon([ours], lr=0.1, weight_decay=0.05)
    reference = torch.optim.Muon(
        [theirs], lr=0.1, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(4):
        gradient = torch.randn(12, 5, 3, 3, generator=generator)
        ours.grad, theirs.grad = gradient, gradient.flatten(1).clone()
        before = copy.deepcopy(ours.detach())
        muon.step()
        reference.step()
        assert (ours - before).abs().max() > 0.01
    # Theirs is computed in bfloat16.
    torch.testing.assert_close(ours.detach().flatten(1), theirs.detach(), atol=0.02, rtol=0)


def test_parameters_of_one_shape_step_together_as_each_would_alone(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 12), (8, 3, 2, 2), (12, 8), (8, 12, 1, 1), (8, 12)]
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [torch.randn(shape, generator=generator) for shape in shapes]

    def stepped(groups):
        parameters = [nn.Parameter(value.clone()) for value in values]
        for numbers in groups:
            muon = Muon([parameters[n] for n in numbers], lr=0.1, weight_decay=0.05)
            for step in range(3):
                for n in numbers:
                    parameters[n].grad = gradients[n] / (1 + step)
                muon.step()
        return [p.detach() for p in parameters]

    alone = stepped([[n] for n in range(len(shapes))])
    together = stepped([range(len(shapes))])
    monkeypatch.setattr(optimization, "_NUMBERS_AT_ONCE", 200)  # two of them
    for found in (together, stepped([range(len(shapes))])):
        torch.testing.assert_close(found, alone)


@pytest.mark.parametrize(
    ("muon_rate", "labels"), [(None, {"lr"}), (0.03, {"lr", "muon_lr"}), (0.01, {"muon_lr"})]
)
def test_rates_are_those_of_the_optimizers_that_have_parameters(muon_rate, labels):
    layers = nn.Sequential(nn.Linear(8, 8, bias=muon_rate != 0.01), nn.Linear(8, 8, bias=False))
    config = OptimizerConfig(learning_rate=0.02, muon_learning_rate=muon_rate, warmup_steps=2)
    optimizers = Optimizers({"a": TrainedNetwork(layers, config)}, Accelerator(cpu=True))
    optimizers.set_learning_rates(step=0, total_steps=4)
    assert optimizers.learning_rates() == {
        f"a.{label}": pytest.approx((0.02 if label == "lr" else muon_rate) / 2) for label in labels
    }
    before = [p.detach().clone() for p in layers.parameters()]
    layers(torch.ones(1, 8)).square().sum().backward()
    optimizers.step(optimizers.clip())
    assert all(not torch.equal(p, q) for p, q in zip(layers.parameters(), before, strict=True))


def test_kernels_are_stepped_by_muon_and_the_rest_by_adamw():
    network = nn.ModuleDict({
        "conv": nn.Conv2d(3, 8, 3), "to_colours": nn.Conv2d(8, 3, 3), "norm": nn.GroupNorm(2, 8),
        "time_emb_proj": nn.Linear(8, 8), "to_q": nn.Linear(8, 8), "embedding": nn.Embedding(9, 8),
    })  # fmt: skip
    kernels = {name for name, p in network.named_parameters() if is_kernel(name, p)}
    assert kernels == {"conv.weight", "to_q.weight"}
