"""Write what a run has trained: the pipeline's folder with a model card, and bare adapters."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tadsr.checkpoints import save_adapters, save_native
from tadsr.checkpoints.checkpoint import Checkpoint
from tadsr.config import torch_dtype
from tadsr.networks.adapter_targets import DEFAULT_ALPHA
from tadsr.networks.adapters import extract_adapters, has_adapters
from tadsr.training.recipe import config_to_mapping
from tadsr.training.training_config import TrainingConfig
from tadsr.version import __version__
from tadsr.whole_file import whole_file

_KINDS = {
    "autoencoder": "An autoencoder; its UNet is not trained.",
    "teacher": "A latent-diffusion teacher for distillation, no upscaler by itself.",
    "distillation": "A one-step super-resolution model.",
}


@dataclass(frozen=True)
class TrainingFacts:
    """What a model card says beside the configuration."""

    step: int
    """Steps done."""
    num_samples: int
    """Samples seen, by all processes."""
    data: str
    """What was trained on, in a few words."""
    metrics: dict[str, Any]
    """The last validation's figures by label; empty without validation."""


def export_model(
    checkpoint: Checkpoint, folder: Path, config: TrainingConfig, facts: TrainingFacts
) -> None:
    """Write a trained pipeline, replacing an earlier export."""
    parts = checkpoint.components()
    # What is attached is written; the set that was loaded is older.
    parts |= {"adapters": None, "metadata": _metadata(checkpoint, facts)}
    save_native(
        folder,
        **parts,
        dtype=torch_dtype(config.export_precision),
        card=_training_card(config, facts),
        overwrite=True,
    )
    if has_adapters(checkpoint.unet) and has_adapters(checkpoint.vae):
        adapters = extract_adapters(checkpoint.unet, checkpoint.vae)
        if adapters.alpha == DEFAULT_ALPHA:
            target = folder.parent / "tadsr.pkl"
            with whole_file(target) as partial:
                save_adapters(adapters, partial)


def _training_card(config: TrainingConfig, facts: TrainingFacts) -> str:
    """Return the model card as Markdown: what it is, data, length, figures, configuration."""
    lines = [
        "---",
        "library_name: tadsr",
        "pipeline_tag: image-to-image",
        "---",
        "",
        f"# {_KINDS[config.stage.kind]}",
        "",
        f"Trained with tadsr {__version__} and torch {torch.__version__}.",
        "",
        f"- Started from: `{config.model}`",
        f"- Data: {facts.data}; degradation `{config.data.degradation}`",
        f"- Length: {facts.step} steps, {facts.num_samples} samples of {config.data.crop_px} px, "
        f"{config.precision}",
        "",
    ]
    if facts.metrics:
        names = sorted({name for figures in facts.metrics.values() for name in figures})
        lines += ["## Validation", "", f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
        for label, figures in facts.metrics.items():
            cells = [f"{figures[name]:.4f}" if name in figures else "" for name in names]
            lines.append(f"| {label} | {' | '.join(cells)} |")
        lines.append("")
    mapping = config_to_mapping(config)
    # Where it was written says nothing about the model, and may be private.
    mapping.pop("output")
    dump = json.dumps(mapping, indent=2)
    return "\n".join([*lines, "## Configuration", "", "```json", dump, "```", ""])


def _metadata(checkpoint: Checkpoint, facts: TrainingFacts) -> dict[str, Any]:
    """Return the starting point's facts, since its licence binds what is trained from it."""
    return {**checkpoint.metadata, "training_steps": facts.step}
