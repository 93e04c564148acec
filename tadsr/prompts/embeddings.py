"""Embeddings of prompts by a text encoder, kept for when a prompt comes again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MAX_PROMPTS = 32
"""Prompts whose embeddings are kept."""


class TextEmbeddings:
    """Embeds prompts, those that were used lately without the text encoder."""

    def __init__(self) -> None:
        self._encoder: tuple[int, torch.dtype, torch.device] | None = None
        self._rows: OrderedDict[str, Tensor] = OrderedDict()

    def clear(self) -> None:
        """Forget all embeddings, as after a change of the text encoder's weights."""
        self._rows.clear()

    def of(
        self, prompts: Sequence[str], text_encoder: Any, tokenizer: Any, device: torch.device
    ) -> Tensor:
        """Return the embeddings of prompts.

        Args:
            prompts: B texts, at least one.
            text_encoder: CLIP text model.
            tokenizer: Its tokenizer.
            device: Where to compute.

        Returns:
            (B, L, D); of one text, a view of a single row.
        """
        encoder = (id(text_encoder), text_encoder.dtype, device)
        if encoder != self._encoder:
            self.clear()
            self._encoder = encoder
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._rows]
        if missing:
            tokens = tokenizer(
                missing,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            embeds = text_encoder(tokens.input_ids.to(device))[0]  # [B, L, D]
            self._rows.update(zip(missing, embeds, strict=True))
        for prompt in prompts:
            self._rows.move_to_end(prompt)
        if len(set(prompts)) == 1:
            result = self._rows[prompts[0]].expand(len(prompts), -1, -1)
        else:
            result = torch.stack([self._rows[prompt] for prompt in prompts])
        while len(self._rows) > MAX_PROMPTS:
            self._rows.popitem(last=False)
        return result
