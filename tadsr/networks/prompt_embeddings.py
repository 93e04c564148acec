"""Prompt embeddings that a model carries as tensors in place of a text encoder."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from tadsr.networks.bare import prompt_rows


class PromptEmbeddings(ModelMixin, ConfigMixin):
    """Look up the embedding of one of a few known prompts.

    Args:
        prompts: The prompts the model knows, in the order of the rows; "" should be one of them.
        num_tokens: Tokens per prompt, at least 1.
        embedding_dim: Width of a token, the UNet's `cross_attention_dim`.

    Raises:
        ValueError: No prompt is given, or one is given twice.
    """

    @register_to_config
    def __init__(
        self, prompts: tuple[str, ...] = ("",), num_tokens: int = 1, embedding_dim: int = 1024
    ) -> None:
        super().__init__()
        if not prompts or len(set(prompts)) != len(prompts):
            raise ValueError(f"prompts must be non-empty and distinct, got {tuple(prompts)}")
        self.embeddings = nn.Parameter(torch.randn(len(prompts), num_tokens, embedding_dim) * 0.02)

    def forward(self, prompts: list[str]) -> Tensor:
        """Return the embeddings of known prompts.

        Args:
            prompts: B prompts, each one of `config.prompts`.

        Returns:
            (B, num_tokens, embedding_dim).

        Raises:
            ValueError: A prompt is not known.
        """
        return self.embeddings[prompt_rows(self.config.prompts, prompts)]  # [B, L, D]
