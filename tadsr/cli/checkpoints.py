"""`tadsr info` and `tadsr convert`: look into models and rewrite them."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tadsr.checkpoints.detect import check_source
from tadsr.cli import options
from tadsr.cli.reporting import (
    format_bytes,
    format_count,
    readable_errors,
    silence_libraries,
)
from tadsr.config import Precision

if TYPE_CHECKING:
    from tadsr.checkpoints import CheckpointInfo

INFO_HELP = """Show a model's format, size, timesteps and licence.

\b
Examples:
  tadsr info tadsr-tiny                    the model inside the package
  tadsr info models/sd21 --adapter tadsr.pkl
  tadsr info ./my-model --json             for other programs
"""

CONVERT_HELP = """Write a model in another format or precision.

\b
"native" is a diffusers folder of safetensors, its adapters merged or kept apart;
"official" is the published layout: the base model's folder with tadsr.pkl.

\b
Examples:
  tadsr convert models/TADSR tadsr-native --dtype fp16
  tadsr convert models/sd21 tadsr-native --adapter tadsr.pkl --keep-adapters
  tadsr convert tadsr-native published --to official
"""

SourceArgument = Annotated[
    str, typer.Argument(metavar="SOURCE", help="Built-in model, folder, or hub id owner/name.")
]


def info(
    source: SourceArgument = "tadsr-tiny",
    adapter: options.AdapterOption = None,
    as_json: options.JsonOption = False,
    debug: options.DebugOption = False,
) -> None:
    """Run `tadsr info`."""
    with readable_errors(debug):
        check_source(source, adapter)
        from tadsr.checkpoints import inspect_checkpoint

        silence_libraries(debug)
        found = inspect_checkpoint(source, adapter)
        if as_json:
            totals = {"num_parameters": found.num_parameters, "num_bytes": found.num_bytes}
            text = json.dumps({**asdict(found), **totals}, indent=2, default=str)
        else:
            text = "\n".join(_table(found))
        typer.echo(text)


def convert(
    source: SourceArgument,
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder to write.")],
    adapter: options.AdapterOption = None,
    to: Annotated[
        Literal["native", "official"], typer.Option("--to", help="Format to write.")
    ] = "native",
    dtype: Annotated[
        Precision | None, typer.Option("--dtype", help="Precision to write; as stored if left out.")
    ] = None,
    keep_adapters: Annotated[
        bool, typer.Option("--keep-adapters", help="Keep adapters apart in the native format.")
    ] = False,
    overwrite: options.OverwriteFolderOption = False,
    debug: options.DebugOption = False,
) -> None:
    """Run `tadsr convert`."""
    with readable_errors(debug):
        check_source(source, adapter)
        from tadsr.checkpoints import convert_checkpoint, inspect_checkpoint
        from tadsr.config import torch_dtype

        silence_libraries(debug)
        folder = convert_checkpoint(
            source,
            out,
            adapter=adapter,
            to=to,
            dtype=None if dtype is None else torch_dtype(dtype),
            keep_adapters=keep_adapters,
            overwrite=overwrite,
        )
        size = format_bytes(inspect_checkpoint(folder).num_bytes)
        typer.echo(f"{source} -> {folder} ({to}, {size})")


def _table(found: CheckpointInfo) -> list[str]:
    first, last = found.timestep_range
    default = "" if found.default_timestep is None else f", default {found.default_timestep}"
    size = found.default_process_size
    small = {} if size is None else {"small photos": f"computed at a shorter side of {size} px"}
    prompts = "any" if found.prompts is None else ", ".join(filter(None, found.prompts)) or "none"
    facts = {
        "source": found.source,
        "folder": str(found.folder),
        "format": found.format,
        "licence": found.licence,
        "scale": f"×{found.scale}",
        "timesteps": f"{first}..{last}{default}",
        **small,
        "latents": f"{found.latent_channels} channels",
        "prompts": prompts,
        "adapters": _adapters(found),
        "size": f"{format_count(found.num_parameters)} parameters, {format_bytes(found.num_bytes)}",
    }
    width = max(map(len, facts)) + 2
    lines = [f"{name:<{width}}{value}" for name, value in facts.items()]
    rows = [("component", "parameters", "size", "dtype", "variants", "files")]
    for part in found.components:
        has_weights = part.num_bytes > 0
        rows.append(
            (
                part.name,
                format_count(part.num_parameters) if has_weights else "-",
                format_bytes(part.num_bytes) if has_weights else "-",
                ", ".join(part.dtypes) or "-",
                ", ".join(name or "plain" for name in part.variants) or "-",
                _files(part.files),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (f"{cell:<{size}}" for cell, size in zip(row, widths, strict=True))
        lines.append("  ".join(cells).rstrip())
    lines.insert(len(facts), "")
    return lines


def _adapters(found: CheckpointInfo) -> str:
    if found.adapter_file is None:
        return "none beside the base model" if found.format == "official" else "merged"
    return (
        f"{found.adapter_file} (rank {found.rank_unet} UNet, {found.rank_vae} VAE, "
        f"alpha {found.lora_alpha:g}, {format_count(found.num_adapter_parameters)} parameters)"
    )


def _files(files: tuple[str, ...]) -> str:
    return f"{files[0]} and {len(files) - 1} more" if len(files) > 1 else (files or ("-",))[0]
