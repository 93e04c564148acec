"""`tadsr train`: run a training from a recipe, from options, or from both."""

from __future__ import annotations

import warnings
from typing import Annotated, Any

import typer

from tadsr.cli import options
from tadsr.cli.reporting import UsageError, readable_errors, silence_libraries
from tadsr.errors import ImageReadWarning
from tadsr.lazily import lasting_imports

TRAIN_HELP = """Train a model, or go on with an interrupted run.

The same command in the same output folder goes on where it was.

\b
Examples:
  tadsr train --model owner/tadsr-base --data photos/ --output runs/mine
  tadsr train --config recipe.yaml --data photos/ --set stage.tavsd_weight=0
  accelerate launch -m tadsr train --config recipe.yaml     several GPUs

Options win over the recipe. The result is OUTPUT/model, to be given to
`tadsr upscale --model`; log.jsonl, samples/ and checkpoints/ lie beside it.
"""

_SET_HELP = "A field of the recipe by dotted name; repeatable. Values are YAML."


def train(
    config: Annotated[
        str | None, typer.Option("--config", "-c", metavar="FILE", help="Recipe, a YAML file.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="What to start from: folder, hub id, or networks.yaml.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", "-d", metavar="PATH", help="Photographs: folder, list file, shards."
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FOLDER", help="The run's folder.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", metavar="N", help="Total number of optimizer steps.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", metavar="N", help="Samples per process.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", metavar="TYPE", help="fp32, fp16 or bf16.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", help="Seed of everything random.")
    ] = None,
    perceptual: Annotated[
        str | None,
        typer.Option("--perceptual", metavar="NAME", help="lpips, dists, squeezenet:FILE or none."),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help=_SET_HELP)
    ] = None,
    debug: options.DebugOption = False,
) -> None:
    """Run `tadsr train`."""
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
    with readable_errors(debug):
        silence_libraries(debug)
        # Of pages and animations the first is meant, and it would be said once a worker.
        warnings.simplefilter("ignore", ImageReadWarning)
        _run(config, overrides, settings or [])


def _run(config: str | None, overrides: dict[str, Any], settings: list[str]) -> None:
    import logging

    with lasting_imports():
        from tadsr.training.recipe import config_from_mapping, load_recipe, override, parse_value
        from tadsr.training.training_config import TrainingConfig

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("tadsr").setLevel(logging.INFO)
    for item in settings:
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
