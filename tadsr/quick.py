"""A restorer that is there at once: what the command line runs where nothing more is asked for."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from tadsr.checkpoints.quick import BareCheckpoint, load_bare
from tadsr.onestep import EngineName, OneStepEngine
from tadsr.restorer import Restorer


class QuickRestorer(Restorer):
    """Restores images on the CPU by the fused engine over bare layers.

    Where an image needs more than these, as one that is computed in pieces does, the model is
    loaded anew as a `TADSRPipeline` loads it.

    Args:
        source: What the checkpoint was loaded from.
        checkpoint: Its bare layers.
        engine: "auto" or "fused".
        mixes: As for `OneStepEngine`.
    """

    text_encoder = tokenizer = None
    _execution_device = device = torch.device("cpu")

    def __init__(
        self, source: str, checkpoint: BareCheckpoint, engine: EngineName, mixes: bool
    ) -> None:
        vae, unet, self.prompt_embeddings, alphas_cumprod, metadata = checkpoint
        grow = partial(_load_modules, source, unet.dtype)
        chosen = OneStepEngine(vae, unet, alphas_cumprod, engine, mixes=mixes, grow=grow)
        self._prepare(chosen, metadata)

    @property
    def vae(self) -> Any:
        """The autoencoder as it is now."""
        return self._engine.vae

    @property
    def unet(self) -> Any:
        """The UNet as it is now."""
        return self._engine.unet

    def maybe_free_model_hooks(self) -> None:
        """Do nothing: nothing is offloaded."""


def open_quickly(
    source: str, dtype: torch.dtype, engine: EngineName, *, mixes: bool = False
) -> QuickRestorer | None:
    """Return a restorer without importing diffusers, or None where that needs the pipeline.

    Args:
        source: As in `TADSRPipeline.from_pretrained`.
        dtype: Of the weights.
        engine: As in `TADSRPipeline.set_engine`.

    Raises:
        CheckpointError: The checkpoint is missing.
    """
    checkpoint = load_bare(source, dtype) if engine in ("auto", "fused") else None
    return None if checkpoint is None else QuickRestorer(source, checkpoint, engine, mixes)


def _load_modules(source: str, dtype: torch.dtype) -> tuple[Any, Any]:
    from tadsr.pipeline import TADSRPipeline

    pipe = TADSRPipeline.from_pretrained(source, torch_dtype=dtype)
    return pipe.vae, pipe.unet
