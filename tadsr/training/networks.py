"""Types of a run's weights."""

from __future__ import annotations

import torch
from torch import nn


def keep_frozen_weights_in(dtype: torch.dtype, *modules: nn.Module | None) -> None:
    """Cast the weights of frozen matrix products in place; norms and trained weights stay float32.

    Args:
        dtype: What autocast computes such products in anyway.
        modules: Modules to go through; None is left out.
    """
    for module in (m for root in modules if root is not None for m in root.modules()):
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            parameters = list(module.parameters(recurse=False))
            if not any(p.requires_grad for p in parameters):
                for parameter in parameters:
                    parameter.data = parameter.data.to(dtype)
