"""`tadsr tag` and `tadsr convert-tagger`: describe images, and make the published tagger small."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import typer

from tadsr.cli import options
from tadsr.cli.console import ON_TERMINALS, end_run
from tadsr.cli.model import choose_device
from tadsr.cli.reporting import UsageError, format_bytes, interrupted_by_sigterm
from tadsr.config import Precision, torch_dtype

_LISTS = options.option(
    None, "--lists FOLDER", "Folder of the two tag lists, if not beside the weights."
)
_PLAIN = options.option(False, "--plain", "RAM as it is, without the DAPE adapter.")


def convert_tagger(
    source: str = options.argument("SOURCE", "Folder or hub id of the published files."),
    out: str = options.argument("OUT", "Folder to write."),
    lists: str | None = _LISTS,
    plain: bool = _PLAIN,
    dtype: Precision = options.option("fp32", "--dtype", "Precision to write."),
    overwrite: bool = options.OVERWRITE_FOLDER,
    debug: bool = options.DEBUG,
) -> None:
    """Convert the published tagger to safetensors.

    The published file has 5.6 GB, among them an optimizer's state. The result is what --tagger
    takes: the adapter is merged, and it has 0.85 GB, or half of that with --dtype fp16.

    \b
    Examples:
      tadsr convert-tagger weights/TADSR weights/tagger
      tadsr convert-tagger zty557/TADSR weights/tagger --lists ram/data
    """
    from tadsr.checkpoints import tagger

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
    source: str = options.argument("INPUT", "Folder of images, or one image."),
    out: str | None = options.argument(
        "OUTPUT", "File to write; INPUT/tags.jsonl if left out.", None
    ),
    tagger: str = options.option(
        ..., "--tagger FOLDER|ID|MODULE:NAME", "What describes the images."
    ),
    plain: bool = _PLAIN,
    view: Literal["enlarged", "whole"] = options.option(
        "enlarged", "--view", "What it sees: as TADSR enlarges it, or as RAM's own code."
    ),
    lists: str | None = _LISTS,
    batch: int = options.option(
        8,
        "--batch N",
        "Images at once.",
        callback=options.within(1, 10_000, "how many fit depends on the tagger and the memory"),
    ),
    device: str = options.DEVICE,
    max_pixels: int = options.MAX_PIXELS_READ,
    overwrite: bool = options.OVERWRITE,
    quiet: bool = options.QUIET,
    debug: bool = options.DEBUG,
) -> None:
    """Describe images by a tagger's words.

    For a folder they are written to a file, for one image printed.

    \b
    Examples:
      tadsr tag photo.jpg --tagger weights/tagger
      tadsr tag lq/ tags.jsonl --tagger weights/tagger      the captions of a training
      tadsr tag lq/ --tagger my_captions:describe           a function of my_captions.py

    The file has a JSON line per image, {"file_name": ..., "tags": ...}; the same command
    goes on where a run was broken off. The result is what `data.captions` of a recipe takes.
    """
    with interrupted_by_sigterm():
        from tqdm import tqdm

        from tadsr.checkpoints.tagger import open_tagger
        from tadsr.folders.tagging import plan_tags, show_image, tag_images

        about = {"view": view, "lists": lists, "device": choose_device(device)}
        about |= {"adapter": None} if plain else {}
        if not Path(source).is_dir():
            if out is not None:
                raise UsageError(
                    "OUTPUT is the file for a folder's images; one image's are printed"
                )
            image = show_image(source, max_pixels)
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
            disable=quiet or ON_TERMINALS,
        ) as bar:
            describe = open_tagger(tagger, **about) if plan.wanted else str
            tally = tag_images(
                plan, describe, batch_images=batch, max_pixels=max_pixels, progress=bar.update
            )
    counts = f"{source} -> {plan.path}: {tally.num_tagged} tagged, {tally.num_known} before"
    end_run(counts, tally.failures, quiet)
