"""Options that several commands share, and what turns their texts into values."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from tadsr.cli.model import check_device_name
from tadsr.cli.reporting import UsageError, as_usage_errors, check_range, format_bytes, parse_bytes
from tadsr.cli.targets import FORMAT_SUFFIXES, parse_format
from tadsr.config import MAX_PIXELS, TargetSize
from tadsr.named_files import parse_json, read_text

if TYPE_CHECKING:
    from tadsr.conditioning import TimestepMap
    from tadsr.tile_spec import TileSpec

_LEAST_MEMORY = 100_000_000
"""Bytes that Python and torch take before they do anything."""
_WHITE = 255
"""Of 8 bits; a mask that was meant to be spread over a range, most likely."""


def option(default: Any, declared: str, help: str, **more: Any) -> Any:
    """Return an option of a command.

    Args:
        declared: Its names and what stands for its value in the help, such as "--width PX".
    """
    words = declared.split()
    names = [word for word in words if word.startswith("-")]
    metavar = " ".join(words[len(names) :]) or None
    return typer.Option(default, *names, metavar=metavar, help=help, **more)


def argument(metavar: str, help: str, default: Any = ...) -> Any:
    """Return an argument of a command, which must be given unless it has a default."""
    return typer.Argument(default, metavar=metavar, help=help)


def within(low: int, high: int, hint: str) -> Callable[..., Any]:
    """Return a callback that checks an option's number, or each of its numbers."""

    def check(param: typer.CallbackParam, value: Any) -> Any:
        for number in value if isinstance(value, list | tuple) else [value]:
            check_range(param.opts[0], number, low, high, hint)
        return value

    return check


def parse_scale(text: str) -> float:
    """Turn a scale, which people write as 4, 4x or x4, into a number."""
    try:
        return float(re.sub("^[x×]|[x×]$", "", str(text).strip().lower()))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a number such as 2 or 1.5") from error


def parse_max_pixels(text: str) -> int:
    """Turn what `--max-pixels` was given, such as "500M" or "1.5G", into a number."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kMG]?)", str(text).strip(), re.IGNORECASE)
    number = int(float(found[1]) * 1000 ** " KMG".index(found[2].upper() or " ")) if found else 0
    if number < 1:
        raise UsageError(f"--max-pixels must be a number such as 500M or 2G, got {text!r}")
    return number


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
        raise UsageError(
            f"--lora must be FILE or FILE:WEIGHT such as style.safetensors:0.8, got {text!r}"
        )
    if not os.path.exists(os.path.expanduser(file)):
        raise UsageError(f"--lora must name a file that exists, got {file!r}; check the path")
    return file, strength


def parse_color(text: str) -> tuple[int, int, int]:
    """Turn a colour's name or number, such as "white", "#204060" or "rgb(32, 64, 96)", into RGB."""
    from PIL import ImageColor

    try:
        return ImageColor.getrgb(text)[:3]
    except ValueError as error:
        raise UsageError(
            f"--background must be a colour such as white or #204060, got {text!r}"
        ) from error


def format_option(formats: list[str], default: str | None, help: str) -> Any:
    """Return the option that names the format of results."""

    def parser(text: str) -> str:  # older versions of typer take no partial
        return parse_format(text, formats)

    declared = f"--format -f {'|'.join(formats)}"
    return option(default, declared, help, parser=parser, autocompletion=lambda: formats)


TIMESTEP = option(
    None,
    "--timestep -t 0..999",
    "Small is faithful, large is vivid.  [default: the model's own]",
    callback=within(0, 999, "small is faithful, large is vivid"),
)
FORMAT = format_option(
    ["same", *FORMAT_SUFFIXES],
    None,
    "Format of outputs that are not named; same: the input's; png by default.",
)
SCALE = option(
    4, "--scale -s X", "Output size divided by input size, at least 1.", parser=parse_scale
)
PROMPT = option(None, "--prompt -p TEXT", "What the pictures show, for models that read text.")
TAGGER = option(
    None,
    "--tagger dape|ram|FOLDER|MODULE:NAME",
    "Describes each picture before the prompt; dape: the one beside the model.",
)
PROMPT_STYLE = option(
    "published", "--prompt-style", "How a tagger's words and the prompt are joined."
)
COLOR_FIX = option("adain", "--color-fix", "How to keep the input's colours.")
PROCESS_SIZE = option(
    None,
    "--process-size PX",
    "Shorter side that small photos are computed at; 0: their own.",
    show_default="the model's own",
)
SEAMLESS = option(
    None, "--seamless", "Textures that repeat to the right (x), below (y) or both, tile again."
)
MODEL = option("tadsr-tiny", "--model -m MODEL", "Built-in model, folder, or hub id owner/name.")
MODELS = option(
    None, "--model -m MODEL", "Built-in model, folder, or hub id; repeatable, to choose from."
)
ADAPTER = option(None, "--adapter FILE", "tadsr.pkl, if not in the model's folder.")
LORA = option(None, "--lora FILE[:WEIGHT]", "Merge another LoRA; repeatable.", parser=parse_lora)
ENGINE = option("auto", "--engine", "How to run the networks; auto is the fastest.")
TILE = option(
    "auto",
    "--tile auto|off|PX",
    "Whether large images are computed in pieces; PX: how far a piece looks.",
)
MAX_MEMORY = option(None, "--max-memory SIZE", "Most memory to use, such as 6GB or 500MB.")
MAX_PIXELS_READ = option(
    MAX_PIXELS,
    "--max-pixels N",
    "Largest input in pixels, such as 500M; 179M by default.",
    parser=parse_max_pixels,
    show_default=False,
)
DEVICE = option(
    "auto", "--device NAME", "auto, cpu, cuda, 1 for cuda:1, or mps.", parser=check_device_name
)
DEVICES = option(None, "--devices A,B", "Use several, such as 0,1 for two CUDA devices.")
DTYPE = option(
    "auto",
    "--dtype",
    "Precision; auto: fp16 on CUDA, else fp32, on a CPU multiplied in bf16 if faster.",
)
OVERWRITE = option(False, "--overwrite", "Replace existing outputs.")
OVERWRITE_FOLDER = option(False, "--overwrite", "Replace an existing folder.")
DEBUG = option(False, "--debug", "Show tracebacks and the libraries' own warnings.")
VERBOSE = option(False, "--verbose -v", "Explain the choice of device, precision and engine.")
QUIET = option(False, "--quiet -q", "Print errors only.")
JSON = option(False, "--json", "Print JSON.")
BORDER = option(
    4,
    "--border PX",
    "Rim to leave out of the measurement.",
    callback=within(0, 10_000, "papers leave out as many px as the scale"),
)
SHEET = option(None, "--output -o FILE", "File for the sheet.")
PANEL_WIDTH = option(
    320,
    "--width PX",
    "Width of each picture on the sheet.",
    callback=within(32, 8192, "large sheets show more"),
)
SEED_RANGE = within(0, 2**63 - 1, "any number will do")  # torch takes seeds of 64 bits
WIDTH = option(None, "--width PX", "Width of the results, instead of -s; larger photos are shrunk.")
HEIGHT = option(None, "--height PX", "Height of the results; with --width: fit into both.")
LONG_SIDE = option(None, "--long-side PX", "Longer side of the results, instead of -s.")
SHORT_SIDE = option(None, "--short-side PX", "Shorter side of the results, instead of -s.")
TIMESTEP_MAP = option(
    None,
    "--timestep-map FILE",
    "Instead of -t: a grey image of timesteps, resized to each photo, or regions in JSON.",
)
TIMESTEP_RANGE = option(
    None, "--timestep-range LO:HI", "Timesteps that black and white stand for in such an image."
)


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


def parse_timestep_range(
    timestep_map: Path | None, timestep_range: str | None
) -> tuple[int, int] | None:
    """Return the timesteps of a map's black and white, or None."""
    if timestep_range is None:
        return None
    if timestep_map is None or timestep_map.suffix.lower() == ".json":
        raise UsageError("--timestep-range needs --timestep-map with an image")
    ends = timestep_range.split(":")
    if len(ends) != 2 or not all(end.isdecimal() for end in ends):
        raise UsageError(f"--timestep-range must be like 50:800, got {timestep_range!r}")
    return int(ends[0]), int(ends[1])


def read_timestep_map(
    path: Path, timestep_range: tuple[int, int] | None
) -> tuple[TimestepMap | dict[str, Any], int]:
    """Read a map from its file.

    Args:
        timestep_range: Timesteps of black and white of an image; None for its own values.

    Returns:
        The map and its largest timestep.

    Raises:
        OSError: It cannot be read.
    """
    from tadsr.conditioning import TimestepMap, largest_timestep
    from tadsr.images import read_image

    with as_usage_errors(f"{path}: "):
        if path.suffix.lower() == ".json":
            found = parse_json(read_text(path))
        else:
            found = TimestepMap.from_image(read_image(path), timestep_range)
            if timestep_range is None and found.values.max() == _WHITE:
                typer.echo(
                    f"{path}: white is taken as timestep {_WHITE}, as it is written; "
                    "--timestep-range 50:800 spreads black to white over timesteps",
                    err=True,
                )
        return found, round(largest_timestep(found))
