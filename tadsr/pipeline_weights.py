"""What a pipeline does with its weights: save, publish, merge adapters and LoRAs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tadsr.checkpoints import save_native
from tadsr.checkpoints.card import model_card
from tadsr.checkpoints.hub import publish
from tadsr.checkpoints.lora_files import read_lora
from tadsr.networks.adapters import AdapterSet, extract_adapters, fuse_adapters, has_adapters
from tadsr.networks.lora import merge_lora
from tadsr.prompts import TextEmbeddings


class PipelineWeights:
    """The methods of `TADSRPipeline` that write or change weights.

    Attributes:
        metadata: Facts that travel with the weights, such as "license".
    """

    components: dict[str, Any]
    tagger: Any
    metadata: Mapping[str, Any]
    _text_embeddings: TextEmbeddings

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move the networks as diffusers does; a tagger that is a network goes along."""
        moved = super().to(*args, **kwargs)
        if isinstance(self.tagger, torch.nn.Module):
            getattr(self.tagger, "to_device", self.tagger.to)(self.device)
        return moved

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        variant: str | None = None,
        torch_dtype: torch.dtype | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write the pipeline as a diffusers folder of safetensors, all or nothing.

        Args:
            save_directory: Folder to create.
            variant: Variant in the weight files' names, such as "fp16".
            torch_dtype: Type the weights are written in; None for their own.
            overwrite: Whether an existing folder is replaced.

        Raises:
            CheckpointError: The folder exists or cannot be written.
        """
        save_native(
            save_directory,
            **self.components,
            adapters=self.adapters,
            metadata=self.metadata,
            variant=variant,
            dtype=torch_dtype,
            overwrite=overwrite,
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        token: str | bool | None = None,
        torch_dtype: torch.dtype | None = None,
        card: str | None = None,
    ) -> str:
        """Publish the pipeline on the hub with a model card, in one commit.

        Args:
            repo_id: "owner/name"; made if it is new.
            private: Whether a new repository is private; None for the owner's default.
            revision: Branch that exists; None for the main one.
            commit_message: None for a plain one.
            token: Access token that may write; None for the stored one.
            torch_dtype: Type the weights are written in; None for their own.
            card: README.md; None for one made from what is known, its licence included.

        Returns:
            The commit's address.

        Raises:
            CheckpointError: The hub refuses or cannot be reached, or the weights cannot be saved.
        """
        networks = {n: m for n, m in self.components.items() if isinstance(m, torch.nn.Module)}
        known = None if self.prompt_embeddings is None else self.prompt_embeddings.config.prompts
        card = card or model_card(
            repo_id,
            num_parameters={n: sum(p.numel() for p in m.parameters()) for n, m in networks.items()},
            prompts="any" if self.text_encoder is not None else f"only {list(known)}",
            metadata=self.metadata,
        )
        write = partial(
            save_native,
            **self.components,
            adapters=self.adapters,
            metadata=self.metadata,
            dtype=torch_dtype,
            card=card,
        )
        return publish(
            repo_id,
            write,
            private=private,
            revision=revision,
            commit_message=commit_message,
            token=token,
        )

    @property
    def adapters(self) -> AdapterSet | None:
        """The LoRA adapters kept apart from the weights, or None when merged."""
        return extract_adapters(self.unet, self.vae) if has_adapters(self.unet) else None

    def merge_adapters(self) -> None:
        """Add adapters that were kept apart into the weights; the result stays the same."""
        fuse_adapters(self.unet, self.vae)

    def merge_lora(self, source: str | Path, *, scale: float = 1.0) -> None:
        """Add another LoRA to the weights, for good: a style, a subject, a kind of picture.

        Adapters that are kept apart stay so. To be without it again, load the model anew, or
        merge it a second time with the negative `scale`, which undoes it within rounding.

        Args:
            source: A .safetensors file or a folder, of diffusers or PEFT, for the base model.
            scale: Its strength; 1 is as trained.

        Raises:
            CheckpointError: It is missing, damaged, or does not fit; nothing is changed then.
        """
        products = read_lora(source, self.unet, self.text_encoder)
        merge_lora(self.unet, products["unet"], scale)
        if self.text_encoder is not None:
            merge_lora(self.text_encoder, products["text_encoder"], scale)
        self._text_embeddings.clear()
