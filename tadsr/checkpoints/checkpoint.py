"""What a loaded checkpoint is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusers import DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, PreTrainedTokenizerBase

from tadsr.networks.adapter_targets import AdapterSet
from tadsr.networks.prompt_embeddings import PromptEmbeddings
from tadsr.networks.time_aware_vae import TimeAwareAutoencoderKL


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Hold a checkpoint's loaded parts.

    Args:
        vae: The time-aware VAE.
        unet: The student UNet.
        scheduler: The noise schedule; only its betas matter.
        text_encoder: CLIP's text encoder, or None where `prompt_embeddings` stand for it.
        tokenizer: Its tokenizer.
        prompt_embeddings: Embeddings of known prompts in place of a text encoder.
        adapters: The adapters where they are kept apart: `unet` and `vae` then have them attached,
            unmerged. None where merged.
        format: "native" or "official".
        source: What was loaded: a folder or a hub id.
        metadata: Facts that travel with the weights, such as "license".
    """

    vae: TimeAwareAutoencoderKL
    unet: UNet2DConditionModel
    scheduler: DDPMScheduler
    text_encoder: CLIPTextModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    prompt_embeddings: PromptEmbeddings | None = None
    adapters: AdapterSet | None = None
    format: str = "native"
    source: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def components(self) -> dict[str, Any]:
        """Return what `save_native` and `save_official` take by keyword; nothing is copied."""
        names = ("vae", "unet", "scheduler", "text_encoder", "tokenizer", "prompt_embeddings")
        return {name: getattr(self, name) for name in (*names, "adapters", "metadata")}
