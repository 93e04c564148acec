"""Prompts as the networks read them, computed once."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tadsr.checkpoints.checkpoint import Checkpoint

MEMORY_ENTRIES = 4096
"""Embeddings kept in memory; Stable Diffusion's take 0.3 MB each."""


class PromptEncoder:
    """Turn prompts into embeddings by a frozen text encoder, or by embeddings of known prompts.

    Args:
        checkpoint: Gives a text encoder with its tokenizer, or prompt embeddings.
        cache: Folder that keeps a text encoder's embeddings between runs; None keeps none.
        device: Where embeddings are wanted and the text encoder runs.
    """

    def __init__(
        self, checkpoint: Checkpoint, cache: Path | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.text_encoder = checkpoint.text_encoder
        self.tokenizer = checkpoint.tokenizer
        self.prompt_embeddings = checkpoint.prompt_embeddings
        self.device = device
        self.cache = cache
        self.memory: OrderedDict[str, Tensor] = OrderedDict()
        self.known: tuple[str, ...] = ()
        # Another text encoder's cache in the same folder must not be mistaken for this one's.
        self.identity = "" if self.text_encoder is None else _identify(self.text_encoder)

    def check(self, prompts: Sequence[str]) -> None:
        """Take the prompts that will come; raise ValueError unless each can be embedded."""
        self.known = tuple(dict.fromkeys(prompts))
        if self.text_encoder is None:
            self.prompt_embeddings(list(prompts))

    def start(self, device: torch.device) -> None:
        """Embed the prompts that will come, and let the text encoder leave the device again."""
        self.device = device
        if self.text_encoder is not None:
            self(self.known[:MEMORY_ENTRIES] or ("",))
            self.text_encoder.to("cpu")

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Return embeddings of B prompts, (B, L, D), float32; ValueError for an unknown one."""
        if self.text_encoder is None:
            return self.prompt_embeddings(list(prompts)).detach().float().to(self.device)
        return torch.stack([self._embed(prompt).to(self.device) for prompt in prompts])

    def _embed(self, prompt: str) -> Tensor:
        if prompt in self.memory:
            self.memory.move_to_end(prompt)
            return self.memory[prompt]
        path = self._path(prompt)
        embeds = self._read(path)
        if embeds is None:
            embeds = self._compute(prompt)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                partial = path.with_suffix(f".partial{os.getpid()}")
                save_file({"prompt_embeds": embeds.cpu().contiguous()}, partial)
                os.replace(partial, path)
        self.memory[prompt] = embeds
        if len(self.memory) > MEMORY_ENTRIES:
            self.memory.popitem(last=False)
        return embeds

    def _compute(self, prompt: str) -> Tensor:
        self.text_encoder.to(self.device)
        tokens = self.tokenizer(
            prompt,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return self.text_encoder(tokens.input_ids.to(self.device))[0][0].float()  # [L, D]

    def _path(self, prompt: str) -> Path | None:
        if self.cache is None:
            return None
        name = hashlib.sha256(f"{self.identity}\0{prompt}".encode()).hexdigest()
        return self.cache / f"{name}.safetensors"

    @staticmethod
    def _read(path: Path | None) -> Tensor | None:
        if path is None or not path.is_file():
            return None
        try:
            return load_file(path)["prompt_embeds"]
        except (SafetensorError, KeyError):
            return None  # damaged; it is computed and written anew


def _identify(text_encoder) -> str:
    """Return a fingerprint of a text encoder's weights, cheap and sensitive to any training."""
    digest = hashlib.sha256(str(text_encoder.config.to_json_string()).encode())
    for name, tensor in text_encoder.state_dict().items():
        if tensor.is_floating_point():
            digest.update(f"{name}{tensor.double().sum().item():.6f}".encode())
    return digest.hexdigest()
