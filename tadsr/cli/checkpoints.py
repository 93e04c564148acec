"""`tadsr info`, `tadsr convert` and `tadsr export onnx`: look into models and rewrite them."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from tadsr.checkpoints.detect import check_source
from tadsr.cli import options
from tadsr.cli.reporting import Command, Group, align, format_bytes, format_count
from tadsr.config import Precision, torch_dtype

if TYPE_CHECKING:
    from tadsr.checkpoints import CheckpointInfo

_SOURCE: dict[str, Any] = {
    "metavar": "SOURCE",
    "help": "Built-in model, folder, or hub id owner/name.",
}
_OUT = options.argument("OUT", "Folder to write.")


def info(
    source: str = options.argument(**_SOURCE, default="tadsr-tiny"),
    adapter: str | None = options.ADAPTER,
    as_json: bool = options.JSON,
    debug: bool = options.DEBUG,
) -> None:
    """Show a model's format, size, timesteps and licence.

    \b
    Examples:
      tadsr info tadsr-tiny                    the model inside the package
      tadsr info models/sd21 --adapter tadsr.pkl
      tadsr info ./my-model --json             for other programs
    """
    check_source(source, adapter)
    from tadsr.checkpoints import inspect_checkpoint

    found = inspect_checkpoint(source, adapter)
    if as_json:
        totals = {"num_parameters": found.num_parameters, "num_bytes": found.num_bytes}
        typer.echo(json.dumps({**asdict(found), **totals}, indent=2, default=str))
    else:
        typer.echo(f"{align(_facts(found).items())}\n\n{align(_components(found))}")


def convert(
    source: str = options.argument(**_SOURCE),
    out: str = _OUT,
    adapter: str | None = options.ADAPTER,
    to: Literal["native", "official"] = options.option("native", "--to", "Format to write."),
    dtype: Precision | None = options.option(
        None, "--dtype", "Precision to write; as stored if left out."
    ),
    keep_adapters: bool = options.option(
        False, "--keep-adapters", "Keep adapters apart in the native format."
    ),
    overwrite: bool = options.OVERWRITE_FOLDER,
    debug: bool = options.DEBUG,
) -> None:
    """Write a model in another format or precision.

    \b
    "native" is a diffusers folder of safetensors, its adapters merged or kept apart;
    "official" is the published layout: the base model's folder with tadsr.pkl.

    \b
    Examples:
      tadsr convert models/TADSR tadsr-native --dtype fp16
      tadsr convert models/sd21 tadsr-native --adapter tadsr.pkl --keep-adapters
      tadsr convert tadsr-native published --to official
    """
    check_source(source, adapter)
    from tadsr.checkpoints import convert_checkpoint, inspect_checkpoint

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


export = typer.Typer(
    cls=Group,
    help="Write a model in another program's format.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


# Without a second command typer would make `tadsr export` itself the only one.
@export.callback()
def _root() -> None:
    pass


@export.command(cls=Command)
def onnx(
    source: str = options.argument(**_SOURCE),
    out: str = _OUT,
    adapter: str | None = options.ADAPTER,
    overwrite: bool = options.OVERWRITE_FOLDER,
    debug: bool = options.DEBUG,
) -> None:
    """Write a model as three ONNX graphs.

    They take images of any size.

    \b
    OUT gets encoder.onnx (lq, timestep -> latents), unet.onnx (latents, timestep,
    prompt_embeds -> pred_x0), decoder.onnx (latents -> image), onnx.json with their
    shapes, and empty_prompt.npy. Needs: pip install 'tadsr[onnx]'

    \b
    Examples:
      tadsr export onnx tadsr-tiny tiny-onnx
      tadsr export onnx models/sd21 full-onnx --adapter tadsr.pkl
    """
    check_source(source, adapter)
    from tadsr.checkpoints.save import check_target
    from tadsr.onnx_export import export_onnx
    from tadsr.pipeline import TADSRPipeline

    if not debug:
        # The exporter tells of every library that it could also serve.
        logging.getLogger("torch").setLevel(logging.ERROR)
    check_target(Path(out), overwrite)
    pipe = TADSRPipeline.from_pretrained(source, adapter=adapter)
    folder = export_onnx(pipe, out, overwrite=overwrite)
    size = format_bytes(sum(file.stat().st_size for file in folder.iterdir()))
    typer.echo(f"{source} -> {folder} (onnx, {size})")


def _facts(found: CheckpointInfo) -> dict[str, str]:
    first, last = found.timestep_range
    default = "" if found.default_timestep is None else f", default {found.default_timestep}"
    size = found.default_process_size
    small = {} if size is None else {"small photos": f"computed at a shorter side of {size} px"}
    prompts = "any" if found.prompts is None else ", ".join(filter(None, found.prompts)) or "none"
    return {
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


def _adapters(found: CheckpointInfo) -> str:
    if found.adapter_file is None:
        return "none beside the base model" if found.format == "official" else "merged"
    return (
        f"{found.adapter_file} (rank {found.rank_unet} UNet, {found.rank_vae} VAE, "
        f"alpha {found.lora_alpha:g}, {format_count(found.num_adapter_parameters)} parameters)"
    )


def _components(found: CheckpointInfo) -> list[tuple[str, ...]]:
    rows = [("component", "parameters", "size", "dtype", "variants", "files")]
    for part in found.components:
        first, *others = part.files or ("-",)
        rows.append(
            (
                part.name,
                format_count(part.num_parameters) if part.num_bytes else "-",
                format_bytes(part.num_bytes) if part.num_bytes else "-",
                ", ".join(part.dtypes) or "-",
                ", ".join(name or "plain" for name in part.variants) or "-",
                f"{first} and {len(others)} more" if others else first,
            )
        )
    return rows
