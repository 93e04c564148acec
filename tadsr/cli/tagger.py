"""`tadsr tag` and `tadsr convert-tagger`: describe images, and make the published tagger small."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tadsr.cli import options
from tadsr.cli.devices import check_device_name, choose_device
from tadsr.cli.reporting import (
    UsageError,
    as_usage_errors,
    check_range,
    format_bytes,
    interrupted_by_sigterm,
    readable_errors,
    silence_libraries,
)
from tadsr.config import Precision

TAG_HELP = """Describe images by a tagger's words.

For a folder they are written to a file, for one image printed.

\b
Examples:
  tadsr tag photo.jpg --tagger weights/tagger
  tadsr tag lq/ tags.jsonl --tagger weights/tagger      the captions of a training
  tadsr tag lq/ --tagger my_captions:describe           a function of my_captions.py

The file has a JSON line per image, {"file_name": ..., "tags": ...}; the same command
goes on where a run was broken off. The result is what `data.captions` of a recipe takes.
"""

CONVERT_TAGGER_HELP = """Convert the published tagger to safetensors.

The published file has 5.6 GB, among them an optimizer's state. The result is what --tagger takes:
the adapter is merged, and it has 0.85 GB, or half of that with --dtype fp16.

\b
Examples:
  tadsr convert-tagger weights/TADSR weights/tagger
  tadsr convert-tagger zty557/TADSR weights/tagger --lists ram/data
"""

ListsOption = Annotated[
    str | None,
    typer.Option(
        "--lists", metavar="FOLDER", help="Folder of the two tag lists, if not beside the weights."
    ),
]
PlainOption = Annotated[
    bool, typer.Option("--plain", help="RAM as it is, without the DAPE adapter.")
]


def convert_tagger(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Folder or hub id of the published files.")
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder to write.")],
    lists: ListsOption = None,
    plain: PlainOption = False,
    dtype: Annotated[Precision, typer.Option("--dtype", help="Precision to write.")] = "fp32",
    overwrite: options.OverwriteFolderOption = False,
    debug: options.DebugOption = False,
) -> None:
    """Run `tadsr convert-tagger`."""
    with readable_errors(debug):
        from tadsr.checkpoints import tagger
        from tadsr.config import torch_dtype

        silence_libraries(debug)
        folder = tagger.convert_tagger(
            source,
            out,
            lists=lists,
            torch_dtype=torch_dtype(dtype),
            overwrite=overwrite,
            **({"adapter": None} if plain else {}),
        )
        size = format_bytes((folder / tagger.CONVERTED_FILE).stat().st_size)
        typer.echo(f"{source} -> {folder} ({size})")


def tag(
    source: Annotated[str, typer.Argument(metavar="INPUT", help="Folder of images, or one image.")],
    out: Annotated[
        str | None,
        typer.Argument(metavar="OUTPUT", help="File to write; INPUT/tags.jsonl if left out."),
    ] = None,
    tagger: Annotated[
        str,
        typer.Option(
            "--tagger", metavar="FOLDER|ID|MODULE:NAME", help="What describes the images."
        ),
    ] = ...,
    plain: PlainOption = False,
    view: Annotated[
        Literal["enlarged", "whole"],
        typer.Option("--view", help="What it sees: as TADSR enlarges it, or as RAM's own code."),
    ] = "enlarged",
    lists: ListsOption = None,
    batch: Annotated[int, typer.Option("--batch", metavar="N", help="Images at once.")] = 8,
    device: options.DeviceOption = "auto",
    max_pixels: options.MaxPixelsOption = None,
    overwrite: options.OverwriteOption = False,
    quiet: options.QuietOption = False,
    debug: options.DebugOption = False,
) -> None:
    """Run `tadsr tag`."""
    check_device_name(device)
    check_range("--batch", batch, 1, 10_000, "how many fit depends on the tagger and the memory")
    with as_usage_errors():
        limit = options.parse_max_pixels(max_pixels)
    with readable_errors(debug), interrupted_by_sigterm():
        from tqdm import tqdm

        from tadsr.checkpoints.tagger import open_tagger
        from tadsr.folders.tagging import plan_tags, show_image, tag_images

        silence_libraries(debug, quiet)
        about = {"view": view, "lists": lists, "device": choose_device(device)}
        about |= {"adapter": None} if plain else {}
        if not Path(source).is_dir():
            if out is not None:
                raise UsageError(
                    "OUTPUT is the file for a folder's images; one image's are printed"
                )
            image = show_image(source, limit)
            typer.echo(open_tagger(tagger, **about)(image))
            return
        # Of a folder the name only: where it lies may change.
        described = Path(tagger).resolve().name if Path(tagger).is_dir() else tagger
        described += f"{', plain' if plain else ''}{', whole' if view == 'whole' else ''}"
        plan = plan_tags(source, out, described=described, overwrite=overwrite)
        with tqdm(
            total=len(plan.images),
            initial=len(plan.images) - len(plan.wanted),
            unit="image",
            disable=True if quiet else None,  # None: a bar on a terminal only
        ) as bar:
            describe = open_tagger(tagger, **about) if plan.wanted else str
            tally = tag_images(
                plan, describe, batch_images=batch, max_pixels=limit, progress=bar.update
            )
    for failure in tally.failures:
        typer.echo(f"Error: {failure}", err=True)
    if not quiet:
        counts = f"{tally.num_tagged} tagged, {tally.num_known} before"
        typer.echo(f"{source} -> {plan.path}: {counts}, {len(tally.failures)} failed")
    if tally.failures:
        raise typer.Exit(1)
