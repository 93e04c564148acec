"""Muon: steps of momentum whose directions are made equally long."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration, which takes singular values to about 1."""
_ITERATIONS = 5
_RMS_OF_ADAMW = 0.2
"""Root mean square of AdamW's steps per learning rate, which is given to these steps too."""
_FEWEST_ROWS = 5
"""Kernels of fewer outputs, such as an image's colours, are left to AdamW."""


class Muon(torch.optim.Optimizer):
    """Momentum that is orthogonalised, for convolution kernels and matrices.

    `torch.optim.Muon` takes matrices alone, and computes in bfloat16, which is slow on most CPUs.

    Args:
        params: Parameters of at least two dimensions; the first is taken for the rows.
        lr: Learning rate, on the scale of AdamW's.
        weight_decay: Decoupled weight decay, at least 0.

    Source: https://kellerjordan.github.io/posts/muon; the scale is that of arXiv 2502.16982.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Step all parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].mul_(MOMENTUM).add_(parameter.grad)
                ahead = parameter.grad.add(momentum, alpha=MOMENTUM)
                direction = orthogonalize(ahead.flatten(1))
                scale = _RMS_OF_ADAMW * max(direction.shape) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(direction.view_as(parameter), alpha=-group["lr"] * scale)


def orthogonalize(matrix: Tensor) -> Tensor:
    """Return a matrix of the same singular vectors, with singular values of about 1.

    Source: Newton-Schulz iteration of https://kellerjordan.github.io/posts/muon.
    """
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if is_tall else matrix).float()
    x = x / (x.norm() + 1e-7)
    a, b, c = _NEWTON_SCHULZ
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if is_tall else x).to(matrix.dtype)


def is_kernel(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon steps a parameter: kernels and matrices, but not embeddings' or times'."""
    return (
        parameter.ndim >= 2
        and parameter.shape[0] >= _FEWEST_ROWS
        and not any(word in name for word in ("embed", "time"))
    )
