"""Embeddings of prompts, kept for when a prompt comes again."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tadsr.module_watch import ModuleWatch
from tadsr.recently_used import RecentlyUsed

MAX_PROMPTS = 32
"""Prompts whose embeddings are kept."""


@dataclass(frozen=True, eq=False)
class Prompts:
    """Embeddings of prompts, with a cache key for each."""

    embeds: Tensor
    """(B, L, D), on the device; of one prompt for all, a view of a single row."""
    keys: tuple[Hashable, ...] | None = None
    """One per row; equal keys stand for equal embeddings. None where nothing is known of them."""

    def __getitem__(self, rows: slice) -> Prompts:
        """Return some of the prompts."""
        return Prompts(self.embeds[rows], self.keys[rows] if self.keys else None)

    def expand(self, batch: int) -> Prompts:
        """Repeat a single prompt for a batch."""
        keys = self.keys * batch if self.keys else None
        return Prompts(self.embeds.expand(batch, -1, -1), keys)


class TextEmbeddings:
    """Embeds prompts, with a cache of recent ones that is cleared when the weights change."""

    def __init__(self) -> None:
        self._network: tuple[nn.Module, torch.device] | None = None
        self._watch: ModuleWatch | None = None
        self._rows: dict[str, Tensor] = RecentlyUsed(MAX_PROMPTS)
        self._generation = 0

    def __getstate__(self) -> dict[str, object]:
        # A copy has networks of its own, and embeddings on its own device.
        return {**vars(self), "_network": None, "_watch": None, "_rows": RecentlyUsed(MAX_PROMPTS)}

    def clear(self) -> None:
        """Forget all embeddings, as after a change of the network's weights."""
        self._rows.clear()
        self._generation += 1

    def of(
        self,
        prompts: Sequence[str],
        network: nn.Module,
        embed: Callable[[list[str]], Tensor],
        device: torch.device,
    ) -> Prompts:
        """Return the embeddings of prompts.

        Args:
            embed: From texts to embeddings (B, L, D) on the device.
        """
        is_same = self._network == (network, device)
        if not is_same or not (self._watch is None or self._watch.is_current()):
            self.clear()
            self._network = network, device
            # Weights that accelerate keeps elsewhere come and go without a change.
            is_offloaded = hasattr(network, "_hf_hook")
            self._watch = None if is_offloaded else ModuleWatch([network])
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._rows]
        rows = {prompt: self._rows[prompt] for prompt in prompts if prompt in self._rows}
        if missing:
            with torch.inference_mode(False), torch.no_grad():
                rows.update(zip(missing, embed(missing), strict=True))
        self._rows.update(rows)
        if len(rows) == 1:
            embeds = rows[prompts[0]].expand(len(prompts), -1, -1)
        else:
            embeds = torch.stack([rows[prompt] for prompt in prompts])
        return Prompts(embeds, tuple((self._generation, prompt) for prompt in prompts))


def embed_texts(
    text_encoder: Any, tokenizer: Any, device: torch.device, texts: Sequence[str]
) -> Tensor:
    """Embed texts by a CLIP text model, (B, L, D)."""
    tokens = tokenizer(
        list(texts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    return text_encoder(tokens.input_ids.to(device))[0]
