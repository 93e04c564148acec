"""`tadsr convert-tagger`: make the published tagger small."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from tadsr.cli.reporting import DebugOption, format_bytes, readable_errors, silence_libraries

CONVERT_TAGGER_HELP = """Write the part of the published tagger that tags as safetensors.

The published file has 5.6 GB, an optimizer's state among them; the result has 0.85 GB, half of
that with --dtype fp16, with the adapter merged, and is what --tagger takes.

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
    dtype: Annotated[
        Literal["fp32", "fp16", "bf16"], typer.Option("--dtype", help="Precision to write.")
    ] = "fp32",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a folder that exists.")
    ] = False,
    debug: DebugOption = False,
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
