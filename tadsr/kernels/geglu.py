"""The gated linear unit with GELU of Stable Diffusion's feed-forward layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tadsr.kernels.backends import Backend, register, run_fastest


def geglu(x: Tensor, *, backend: Backend | None = None) -> Tensor:
    """Gate one half of the last dimension by the GELU of the other.

    Args:
        x: Hidden values, then gates, (..., 2·D), contiguous, any float dtype.
        backend: "triton" or "reference"; None takes Triton where it can run.

    Returns:
        hidden · GELU(gate) with the exact (erf) GELU, (..., D).

    Raises:
        TypeError: `x` is not a float tensor.
        ValueError: The last dimension is odd or empty, or the chosen backend cannot run.

    Source: Shazeer, GLU Variants Improve Transformer (2020).
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        found = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a floating-point tensor, not {found}")
    if x.ndim == 0 or x.numel() == 0 or x.shape[-1] % 2:
        raise ValueError(f"x must have an even last dimension, no side 0, got {tuple(x.shape)}")
    return run_fastest(torch.ops.tadsr.geglu, reference, (x,), (x,), backend)


def reference(x: Tensor) -> Tensor:
    """Compute `geglu` with torch's own operations."""
    hidden, gate = x.chunk(2, dim=-1)
    return hidden * F.gelu(gate)


register(
    "geglu(Tensor x) -> Tensor",
    plan="geglu.plan_geglu",
    reference=reference,
    fake=lambda x: x.new_empty((*x.shape[:-1], x.shape[-1] // 2)),
)
