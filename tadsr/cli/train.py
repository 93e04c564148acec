"""`tadsr train`: run a training from a recipe, from options, or from both."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import typer

from tadsr.cli import options
from tadsr.cli.reporting import UsageError
from tadsr.errors import ImageReadWarning
from tadsr.lazily import lasting_imports


def train(
    config: str | None = options.option(None, "--config -c FILE", "Recipe, a YAML file."),
    model: str | None = options.option(
        None, "--model -m MODEL", "What to start from: folder, hub id, or networks.yaml."
    ),
    data: str | None = options.option(
        None, "--data -d PATH", "Photographs: folder, list file, shards."
    ),
    output: str | None = options.option(None, "--output -o FOLDER", "The run's folder."),
    steps: int | None = options.option(None, "--steps N", "Total number of optimizer steps."),
    batch_size: int | None = options.option(None, "--batch-size N", "Samples per process."),
    precision: str | None = options.option(None, "--precision TYPE", "fp32, fp16 or bf16."),
    seed: int | None = options.option(None, "--seed N", "Seed of everything random."),
    perceptual: str | None = options.option(
        None, "--perceptual NAME", "lpips, dists, squeezenet:FILE or none."
    ),
    settings: list[str] | None = options.option(
        None,
        "--set NAME=VALUE",
        "A field of the recipe by dotted name; repeatable. Values are YAML.",
    ),
    debug: bool = options.DEBUG,
) -> None:
    """Train a model, or go on with an interrupted run.

    The same command in the same output folder goes on where it was.

    \b
    Examples:
      tadsr train --model owner/tadsr-base --data photos/ --output runs/mine
      tadsr train --config recipe.yaml --data photos/ --set stage.tavsd_weight=0
      accelerate launch -m tadsr train --config recipe.yaml     several GPUs

    Options win over the recipe. The result is OUTPUT/model, to be given to
    `tadsr upscale --model`; log.jsonl, samples/ and checkpoints/ lie beside it.
    """
    overrides: dict[str, Any] = {
        "model": model,
        "data.source": data,
        "output": output,
        "steps": steps,
        "batch_size": batch_size,
        "precision": precision,
        "seed": seed,
        "stage.perceptual": perceptual,
    }
    overrides = {name: value for name, value in overrides.items() if value is not None}
    if perceptual == "none":
        overrides["stage.perceptual_weight"] = 0
    if config is None and not {"model", "data.source", "output"} <= overrides.keys():
        raise UsageError("--config FILE, or --model, --data and --output must be given")
    # Of pages and animations the first is meant, and it would be said once a worker.
    warnings.simplefilter("ignore", ImageReadWarning)
    with lasting_imports():
        from tadsr.training.recipe import config_from_mapping, load_recipe, override, parse_value
        from tadsr.training.training_config import TrainingConfig

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("tadsr").setLevel(logging.INFO)
    for item in settings or []:
        name, separator, text = item.partition("=")
        if not separator:
            raise UsageError(f"--set must be NAME=VALUE such as stage.tavsd_weight=0, got {item!r}")
        overrides[name] = parse_value(name, text)
    if config is None:
        run = config_from_mapping(TrainingConfig, override({}, overrides))
    else:
        run = load_recipe(config, overrides)
    with lasting_imports():
        from tadsr.training.trainer import Trainer  # heavier still

    trainer = Trainer(run)
    if trainer.accelerator.is_main_process:
        steps = run.steps
        typer.echo(f"{run.stage.kind}: {trainer.data.description}, {steps} steps to {run.output}")
    result = trainer.train()
    if trainer.accelerator.is_main_process:
        skipped = f"; {trainer.num_skipped} images were skipped" if trainer.num_skipped else ""
        typer.echo(f"trained: {result}{skipped}")
