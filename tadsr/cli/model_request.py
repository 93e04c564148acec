"""The model that a command line names, before anything heavy is imported."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tadsr.checkpoints.detect import check_source
from tadsr.config import Precision

if TYPE_CHECKING:
    import torch

    from tadsr.onestep.plan import EngineName
    from tadsr.prompts import PromptStyle
    from tadsr.restorer import Restorer

DtypeName = Literal["auto", Precision]


@dataclass(frozen=True)
class ModelRequest:
    """A model and how it is loaded."""

    source: str
    """As in `TADSRPipeline.from_pretrained`, and so are `adapter` and `tagger`."""
    adapter: str | None = None
    dtype: DtypeName = "auto"
    """Precision of the weights; "auto" is fp16 on CUDA and fp32 elsewhere, with products in bf16
    on a CPU that is faster so."""
    prompt: str | None = None
    """What the model must know; None is neutral."""
    timestep: int | None = None
    """The largest that the model must have; None for its own."""
    tagger: str | None = None
    prompt_style: PromptStyle = "published"
    """How a tagger's words and the prompt are joined."""
    engine: EngineName = "auto"
    """How the networks are run."""
    loras: tuple[tuple[str, float], ...] = ()
    """Files of further LoRAs and their strengths, merged into the weights."""

    def check(self) -> None:
        """Raise CheckpointError unless the model can exist."""
        check_source(self.source, self.adapter)

    @property
    def name(self) -> str:
        """What the model is called: of a folder the name only, for where it lies may be private."""
        return Path(self.source).resolve().name if os.path.isdir(self.source) else self.source

    def load(self, device: str | torch.device) -> Restorer:
        """Load the model onto a device."""
        from tadsr.cli.model import load_model  # and with it torch

        return load_model(self, device)
