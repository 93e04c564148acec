"""`tadsr export`: models in other programs' formats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tadsr.checkpoints.detect import check_source
from tadsr.cli import options
from tadsr.cli.checkpoints import SourceArgument
from tadsr.cli.reporting import format_bytes, readable_errors, silence_libraries
from tadsr.cli.suggestions import SuggestingCommand, SuggestingGroup
from tadsr.errors import install

EXPORT_HELP = "Write a model in another program's format."

ONNX_HELP = f"""Write a model as three ONNX graphs.

They take images of any size.

\b
OUT gets encoder.onnx (lq, timestep -> latents), unet.onnx (latents, timestep,
prompt_embeds -> pred_x0), decoder.onnx (latents -> image), onnx.json with their
shapes, and empty_prompt.npy. Needs: {install("onnx")}

\b
Examples:
  tadsr export onnx tadsr-tiny tiny-onnx
  tadsr export onnx models/sd21 full-onnx --adapter tadsr.pkl
"""

export = typer.Typer(
    cls=SuggestingGroup, help=EXPORT_HELP, no_args_is_help=True, rich_markup_mode=None
)


# Without a second command typer would make `tadsr export` itself the only one.
@export.callback()
def _root() -> None:
    pass


@export.command("onnx", cls=SuggestingCommand, help=ONNX_HELP)
def onnx(
    source: SourceArgument,
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder to write.")],
    adapter: options.AdapterOption = None,
    overwrite: options.OverwriteFolderOption = False,
    debug: options.DebugOption = False,
) -> None:
    """Run `tadsr export onnx`."""
    with readable_errors(debug):
        check_source(source, adapter)
        import logging

        from tadsr.checkpoints.save import check_target
        from tadsr.onnx_export import export_onnx
        from tadsr.pipeline import TADSRPipeline

        silence_libraries(debug)
        if not debug:
            # The exporter tells of every library that it could also serve.
            logging.getLogger("torch").setLevel(logging.ERROR)
        check_target(Path(out), overwrite)
        pipe = TADSRPipeline.from_pretrained(source, adapter=adapter)
        folder = export_onnx(pipe, out, overwrite=overwrite)
        size = format_bytes(sum(file.stat().st_size for file in folder.iterdir()))
        typer.echo(f"{source} -> {folder} (onnx, {size})")
