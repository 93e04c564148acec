"""Write what a run has trained: the pipeline's folder with a model card, and bare adapters."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch

from tadsr.checkpoints import save_adapters, save_native
from tadsr.checkpoints.checkpoint import Checkpoint
from tadsr.config import torch_dtype
from tadsr.networks.adapter_targets import DEFAULT_ALPHA
from tadsr.networks.adapters import extract_adapters, has_adapters
from tadsr.training.training_config import TrainingConfig
from tadsr.version import __version__
from tadsr.whole_file import whole_file

_KINDS = {
    "autoencoder": "An autoencoder; its UNet is not trained.",
    "teacher": "A latent-diffusion teacher for distillation, no upscaler by itself.",
    "distillation": "A one-step super-resolution model.",
}


def export_model(
    checkpoint: Checkpoint,
    folder: Path,
    config: TrainingConfig,
    *,
    step: int,
    num_samples: int,
    data: str,
    metrics: dict[str, dict[str, float]],
) -> None:
    """Write a trained pipeline with a model card, replacing an earlier export.

    Args:
        step: Steps done.
        num_samples: Samples seen, by all processes.
        data: What was trained on, in a few words.
        metrics: The last validation's figures by label; empty without validation.
    """
    length = f"{step} steps, {num_samples} samples of {config.data.crop_px} px, {config.precision}"
    card = [
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
        f"- Data: {data}; degradation `{config.data.degradation}`",
        f"- Length: {length}",
        "",
        *_table(metrics),
        "## Configuration",
        "",
        "```json",
        # Where it was written says nothing about the model, and may be private.
        json.dumps({k: v for k, v in asdict(config).items() if k != "output"}, indent=2),
        "```",
        "",
    ]
    parts = checkpoint.components()
    # What is attached is written; the set that was loaded is older.
    # The starting point's facts stay, since its licence binds what is trained from it.
    parts |= {"adapters": None, "metadata": {**checkpoint.metadata, "training_steps": step}}
    save_native(
        folder,
        **parts,
        dtype=torch_dtype(config.export_precision),
        card="\n".join(card),
        overwrite=True,
    )
    if has_adapters(checkpoint.unet) and has_adapters(checkpoint.vae):
        adapters = extract_adapters(checkpoint.unet, checkpoint.vae)
        if adapters.alpha == DEFAULT_ALPHA:
            target = folder.parent / "tadsr.pkl"
            with whole_file(target) as partial:
                save_adapters(adapters, partial)


def _table(metrics: dict[str, dict[str, float]]) -> list[str]:
    """Return a validation's figures as lines of Markdown."""
    if not metrics:
        return []
    names = sorted({name for figures in metrics.values() for name in figures})
    lines = ["## Validation", "", f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for label, figures in metrics.items():
        cells = [f"{figures[name]:.4f}" if name in figures else "" for name in names]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return [*lines, ""]
