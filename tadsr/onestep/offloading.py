"""Weights that accelerate keeps elsewhere and brings to a layer only while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def weights_in_place(layer: nn.Module) -> Iterator[None]:
    """Bring a layer's offloaded weights for a block of code, without running the layer."""
    hook = getattr(layer, "_hf_hook", None)
    if hook is None:
        yield
        return
    hook.pre_forward(layer)
    try:
        yield
    finally:
        hook.post_forward(layer, None)
