"""Commands that report errors in one way, and groups that suggest what a mistyped name meant."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from typer.core import TyperCommand, TyperGroup

from tadsr.cli.reporting import readable_errors, silence_libraries

_KINDS = {"int_parsing": "a whole number", "float_parsing": "a number"}
"""What pydantic calls a wrong value, and people."""
_OPTIONS_INSTEAD = {
    "-i --input": "inputs need no option: tadsr upscale photo.jpg",
    "-n --model-name --model_name": "-m names the model",
    "--outscale -z --upscale --factor": "-s is the output's size over the input's",
    "--ext": "-f is the format",
    "--half --fp16": "--dtype fp16 is for GPUs",
    "--fp32 --no-half --precision": "--dtype sets it, such as fp32",
    "-g --gpu --gpu-id --gpu-ids --cpu": "--device takes cpu, cuda or cuda:N",
    "--tile-size --tile_size --tile_pad --tile_overlap": "--tile and --max-memory set it",
    "--face_enhance": "--timestep-map keeps faces faithful",
    "--denoise_strength --strength --fidelity --steps": (
        "-t moves from faithful to vivid, in one step"
    ),
    "-y --force": "--overwrite replaces results",
    "-r --recursive": "sub-folders are read anyway",
    "-j --jobs --workers --num-workers --batch-size": (
        "there is nothing to set: one process keeps the device busy"
    ),
    "--share --listen --server-name": "--host 0.0.0.0 lets others in",
    "-p --server-port": "--port sets it",
    "--lowvram --medvram": "--max-memory bounds it",
    "--resume --skip-existing": "results that exist are skipped anyway",
    "-w --resolution": "--width and --height set it",
    "--auto-launch --inbrowser": "--open opens the page",
    "--alpha_upsampler": "alpha is carried anyway",
    "--tta": "there is none; leave it out",
    "-c": "--quality sets it",
}
"""What users of other upscalers type, and what does it here."""
_COMMANDS_INSTEAD = {
    "i p run enhance restore": "tadsr upscale",
    "s": "tadsr serve",
    "ui gui webui": "tadsr demo",
    "d download": "tadsr upscale -m owner/name, which downloads",
    "finetune fine-tune": "tadsr train",
    "list models": "tadsr info",
    "onnx openvino": "tadsr export onnx",
    "help": "tadsr --help",
    "version": "tadsr --version",
}


class Command(TyperCommand):
    """A command with --debug, which suggests the option that was meant."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse arguments, with a suggestion in the error for an unknown option."""
        with _suggesting_options():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command: expected errors become one line unless --debug is given."""
        debug = ctx.params["debug"]
        with readable_errors(debug):
            silence_libraries(debug, ctx.params.get("quiet", False))
            return super().invoke(ctx)


class Group(TyperGroup):
    """A group that suggests options too, and `upscale` where a file came instead of a command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse arguments, with a suggestion in the error for an unknown option."""
        try:
            with _suggesting_options():
                return super().parse_args(ctx, args)
        except Exception as error:
            name = getattr(error, "option_name", None)
            commands = [
                n for n, c in self.commands.items() if any(name in p.opts for p in c.params)
            ]
            if name and commands:
                error.message = f"{name} comes after the command, as in tadsr {commands[0]} {name}"
            raise

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        """Find the command, with a suggestion in the error for an unknown one."""
        name = args[0]
        if self.get_command(ctx, name) is None:
            is_path = os.path.exists(name) or os.path.splitext(name)[1] != ""
            meant = _instead(_COMMANDS_INSTEAD, name)
            if is_path and not name.startswith("-"):
                meant = f"tadsr upscale {name}"
            if meant:
                ctx.fail(f"No such command {name!r}. Did you mean '{meant}'?")
        return super().resolve_command(ctx, args)


def _instead(table: dict[str, str], name: str) -> str | None:
    return next((meant for names, meant in table.items() if name in names.split()), None)


@contextmanager
def _suggesting_options() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # Told by its attributes: the class lives in click or in typer, by typer's version.
        name, possibilities = (getattr(error, a, None) for a in ("option_name", "possibilities"))
        if instead := _instead(_OPTIONS_INSTEAD, name or ""):
            error.message = f"{error.message}: {instead}"
            error.possibilities = None
        elif possibilities:
            begun = [option for option in possibilities if option.startswith(name or "-")]
            close = " or ".join(sorted(begun or possibilities))
            error.message = f"{error.message}. Did you mean {close}?"
            error.possibilities = None
        if type(error.__cause__).__name__ == "ValidationError":  # of pydantic, by typer's version
            found = error.__cause__.errors()[0]
            kind = _KINDS.get(found["type"])
            error.message = (
                f"{found['input']!r} is not {kind}"
                if kind
                else error.message.removeprefix("Value error, ")
            )
        raise
