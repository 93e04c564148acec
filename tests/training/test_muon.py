"""Muon's steps, against torch's own where it has them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tadsr.training.muon import Muon, is_kernel, orthogonalize


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


def test_kernels_are_stepped_by_muon_and_the_rest_by_adamw():
    network = nn.ModuleDict({
        "conv": nn.Conv2d(3, 8, 3), "to_colours": nn.Conv2d(8, 3, 3), "norm": nn.GroupNorm(2, 8),
        "time_emb_proj": nn.Linear(8, 8), "to_q": nn.Linear(8, 8), "embedding": nn.Embedding(9, 8),
    })  # fmt: skip
    kernels = {name for name, p in network.named_parameters() if is_kernel(name, p)}
    assert kernels == {"conv.weight", "to_q.weight"}
