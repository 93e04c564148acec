"""How far two ways of computing the same may be apart."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_ERROR = 0.05
"""Largest relative error of a stage: above what half precision rounds, below what is visible."""


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of what is expected; waits for the device."""
    found, expected = found.float(), expected.float()
    smallest = torch.finfo(torch.float32).tiny
    return ((found - expected).norm() / expected.norm().clamp(min=smallest)).item()
