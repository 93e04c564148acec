"""Merge further LoRAs, of other origin than the student's adapters, into its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tadsr.networks.adapters import merged_weight


@dataclass(frozen=True, eq=False)
class LoraProduct:
    """A product to add to one weight.

    Attributes:
        weight: The weight's plain name.
        a: (r, in) or (r, in, k, k).
        b: (out, r) or (out, r, 1, 1).
        scaling: alpha / rank.
    """

    weight: str
    a: Tensor
    b: Tensor
    scaling: float


@torch.no_grad()
def merge_lora(model: nn.Module, products: Sequence[LoraProduct], scale: float) -> None:
    """Add products to a model's weights, in place; sums are float32, then cast.

    Where the model has adapters attached, the weights below them are changed.
    """
    weights = {n.replace(".base_layer.", "."): p for n, p in model.named_parameters()}
    for product in products:
        weight = weights[product.weight]
        weight.copy_(merged_weight(weight, product.a, product.b, scale * product.scaling))
