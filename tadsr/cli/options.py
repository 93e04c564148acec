"""Options that several commands share."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tadsr.cli.model_request import DtypeName
from tadsr.cli.reporting import format_bytes, parse_bytes
from tadsr.cli.targets import FORMAT_SUFFIXES, parse_format
from tadsr.config import MAX_PIXELS, ColorFix, EngineName, Seamless, TargetSize

if TYPE_CHECKING:
    from tadsr.tile_spec import TileSpec

_LEAST_MEMORY = 100_000_000
"""Bytes that Python and torch take before they do anything."""

TimestepOption = Annotated[
    int | None,
    typer.Option(
        "--timestep",
        "-t",
        metavar="0..999",
        help="Small is faithful, large is vivid.  [default: the model's own]",
    ),
]
FormatOption = Annotated[
    str | None,
    typer.Option(
        "--format",
        "-f",
        parser=parse_format,
        autocompletion=lambda: ["same", *FORMAT_SUFFIXES],
        metavar="|".join(("same", *FORMAT_SUFFIXES)),
        help="Format of outputs that are not named; same: the input's; png by default.",
    ),
]


def parse_scale(text: str) -> float:
    """Turn a scale, which people write as 4, 4x or x4, into a number."""
    try:
        return float(re.sub("^[x×]|[x×]$", "", str(text).strip().lower()))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a number such as 2 or 1.5") from error


ScaleOption = Annotated[
    float,
    typer.Option(
        "--scale",
        "-s",
        parser=parse_scale,
        metavar="X",
        help="Output size divided by input size, at least 1.",
    ),
]
PromptOption = Annotated[
    str | None,
    typer.Option(
        "--prompt", "-p", metavar="TEXT", help="What the pictures show, for models that read text."
    ),
]
TaggerOption = Annotated[
    str | None,
    typer.Option(
        "--tagger",
        metavar="dape|ram|FOLDER|MODULE:NAME",
        help="Describes each picture before the prompt; dape: the one beside the model.",
    ),
]
PromptStyleOption = Annotated[
    Literal["published", "training"],
    typer.Option("--prompt-style", help="How a tagger's words and the prompt are joined."),
]
ColorFixOption = Annotated[
    ColorFix, typer.Option("--color-fix", help="How to keep the input's colours.")
]
ProcessSizeOption = Annotated[
    int | None,
    typer.Option(
        "--process-size",
        metavar="PX",
        help="Shorter side that small photos are computed at; 0: their own.",
        show_default="the model's own",
    ),
]
SeamlessOption = Annotated[
    Seamless | None,
    typer.Option(
        "--seamless", help="Textures that repeat to the right (x), below (y) or both, tile again."
    ),
]
ModelOption = Annotated[
    str,
    typer.Option(
        "--model", "-m", metavar="MODEL", help="Built-in model, folder, or hub id owner/name."
    ),
]
AdapterOption = Annotated[
    str | None,
    typer.Option("--adapter", metavar="FILE", help="tadsr.pkl, if not in the model's folder."),
]
EngineOption = Annotated[
    EngineName,
    typer.Option("--engine", help="How to run the networks; auto is the fastest."),
]
TileOption = Annotated[
    str,
    typer.Option(
        "--tile",
        metavar="auto|off|PX",
        help="Whether large images are computed in pieces; PX: how far a piece looks.",
    ),
]
MaxMemoryOption = Annotated[
    str | None,
    typer.Option("--max-memory", metavar="SIZE", help="Most memory to use, such as 6GB or 500MB."),
]
MaxPixelsOption = Annotated[
    str | None,
    typer.Option(
        "--max-pixels", metavar="N", help="Largest input in pixels, such as 500M; 179M by default."
    ),
]
DeviceOption = Annotated[
    str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, 1 for cuda:1, or mps.")
]
DevicesOption = Annotated[
    str | None,
    typer.Option("--devices", metavar="A,B", help="Use several, such as 0,1 for two CUDA devices."),
]
DtypeOption = Annotated[
    DtypeName,
    typer.Option(
        "--dtype",
        help="Precision; auto: fp16 on CUDA, else fp32, on a CPU multiplied in bf16 if faster.",
    ),
]

OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace existing outputs.")]
OverwriteFolderOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace an existing folder.")
]
DebugOption = Annotated[
    bool, typer.Option("--debug", help="Show tracebacks and the libraries' own warnings.")
]
VerboseOption = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Explain the choice of device, precision and engine."),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
BorderOption = Annotated[
    int, typer.Option("--border", metavar="PX", help="Rim to leave out of the measurement.")
]
SheetOption = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="File for the sheet.")
]
PanelWidthOption = Annotated[
    int, typer.Option("--width", metavar="PX", help="Width of each picture on the sheet.")
]

ModelsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="Built-in model, folder, or hub id; repeatable, to choose from.",
    ),
]
HostOption = Annotated[
    str, typer.Option("--host", metavar="ADDRESS", help="0.0.0.0: for other machines too.")
]
MaxUploadOption = Annotated[
    str, typer.Option("--max-upload", metavar="SIZE", help="Largest file, such as 50MB.")
]
MaxResultOption = Annotated[
    int, typer.Option("--max-pixels", metavar="N", help="Largest result in megapixels.")
]


def parse_max_pixels(text: str | None) -> int:
    """Turn what `--max-pixels` was given, such as "500M" or "1.5G", into a number."""
    if text is None:
        return MAX_PIXELS
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kMG]?)", text.strip(), re.IGNORECASE)
    number = int(float(found[1]) * 1000 ** " KMG".index(found[2].upper() or " ")) if found else 0
    if number < 1:
        raise ValueError(f"--max-pixels must be a number such as 500M or 2G, got {text!r}")
    return number


LoraOption = Annotated[
    list[str] | None,
    typer.Option("--lora", metavar="FILE[:WEIGHT]", help="Merge another LoRA; repeatable."),
]
WidthOption = Annotated[
    int | None,
    typer.Option(
        "--width",
        metavar="PX",
        help="Width of the results, instead of -s; larger photos are shrunk.",
    ),
]
HeightOption = Annotated[
    int | None,
    typer.Option(
        "--height", metavar="PX", help="Height of the results; with --width: fit into both."
    ),
]
LongSideOption = Annotated[
    int | None,
    typer.Option("--long-side", metavar="PX", help="Longer side of the results, instead of -s."),
]
ShortSideOption = Annotated[
    int | None,
    typer.Option("--short-side", metavar="PX", help="Shorter side of the results, instead of -s."),
]


def parse_size(
    width: int | None, height: int | None, long_side: int | None, short_side: int | None
) -> tuple[TargetSize | None, str]:
    """Combine the options that set a size.

    Returns:
        The size, or None; and what names of results beside their inputs end with.
    """
    values = (width, height, long_side, short_side)
    given = [value for value in values if value is not None]
    if not given:
        return None, ""
    return TargetSize(*values), f"_{max(given)}px"


def parse_lora(text: str) -> tuple[str, float]:
    """Turn FILE or FILE:WEIGHT into a file and its strength."""
    file, colon, weight = text.rpartition(":")
    if os.path.exists(text) or not colon:
        file, weight = text, "1"
    try:
        strength = float(weight)
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength):
        raise ValueError(
            f"--lora must be FILE or FILE:WEIGHT such as style.safetensors:0.8, got {text!r}"
        )
    if not os.path.exists(os.path.expanduser(file)):
        raise ValueError(f"--lora must name a file that exists, got {file!r}; check the path")
    return file, strength


def parse_color(text: str) -> tuple[int, int, int]:
    """Turn a colour's name or number, such as "white", "#204060" or "rgb(32, 64, 96)", into RGB."""
    from PIL import ImageColor

    try:
        return ImageColor.getrgb(text)[:3]
    except ValueError as error:
        raise ValueError(
            f"--background must be a colour such as white or #204060, got {text!r}"
        ) from error


def parse_tiling(tile: str, max_memory: str | None) -> TileSpec | Literal["auto"] | None:
    """Turn `--tile` and `--max-memory` into the pipeline's `tiling`."""
    if tile not in ("auto", "off") and not tile.isdecimal():
        raise ValueError(f"--tile must be auto, off or a number of px, got {tile!r}")
    if tile == "off" and max_memory is not None:
        raise ValueError("--max-memory needs pieces; leave --tile off out")
    if tile == "off":
        return None
    if tile == "auto" and max_memory is None:
        return "auto"
    from tadsr.tile_spec import ATTENTION_STEP_PX, TileSpec

    if tile != "auto" and int(tile) % ATTENTION_STEP_PX:
        raise ValueError(
            f"--tile must be auto, off or a multiple of {ATTENTION_STEP_PX} px, got {tile}"
        )
    num_bytes = None if max_memory is None else parse_bytes(max_memory)
    if num_bytes is not None and num_bytes < _LEAST_MEMORY:
        raise ValueError(
            f"--max-memory must be at least {format_bytes(_LEAST_MEMORY)}, since the program takes "
            f"more by itself, got {max_memory}; write it as 4GB"
        )
    return TileSpec(max_memory=num_bytes, attention_px=None if tile == "auto" else int(tile))
