"""Options that several commands share."""

from __future__ import annotations

import re
from typing import Annotated, Literal

import typer

from tadsr.config import MAX_PIXELS, ColorFix

ScaleOption = Annotated[
    float,
    typer.Option("--scale", "-s", metavar="X", help="Output size over input size, from 1."),
]
PromptOption = Annotated[
    str | None,
    typer.Option("--prompt", "-p", help="What the pictures show, if the model reads text."),
]
TaggerOption = Annotated[
    str | None,
    typer.Option(
        "--tagger",
        metavar="dape|FOLDER",
        help="Writes each picture's prompt; dape: the one beside the published model.",
    ),
]
ColorFixOption = Annotated[
    ColorFix, typer.Option("--color-fix", help="How the input's colours are kept.")
]
ProcessSizeOption = Annotated[
    int,
    typer.Option(
        "--process-size", metavar="PX", help="Smallest side the network works at; 0: any."
    ),
]
ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="Built-in model, folder, or hub id owner/name.")
]
AdapterOption = Annotated[
    str | None,
    typer.Option("--adapter", metavar="FILE", help="tadsr.pkl, if not in the model's folder."),
]
MaxPixelsOption = Annotated[
    str | None,
    typer.Option(
        "--max-pixels",
        metavar="N",
        help="Largest input, such as 500M; 179M if not given, against files that pretend.",
    ),
]
DeviceOption = Annotated[
    str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1 or mps.")
]
DtypeOption = Annotated[
    Literal["auto", "fp32", "fp16", "bf16"],
    typer.Option("--dtype", help="Precision; auto: fp16 on CUDA, else fp32."),
]


def parse_max_pixels(text: str | None) -> int:
    """Turn what `--max-pixels` was given, such as "500M" or "1.5G", into a number.

    Raises:
        ValueError: It is no such number, or below 1.
    """
    if text is None:
        return MAX_PIXELS
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kMG]?)", text.strip(), re.IGNORECASE)
    number = int(float(found[1]) * 1000 ** " KMG".index(found[2].upper() or " ")) if found else 0
    if number < 1:
        raise ValueError(f"--max-pixels must be a number such as 500M or 2G, got {text!r}")
    return number
