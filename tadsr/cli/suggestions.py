"""Answer a mistyped command or option with the one that was probably meant."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from typer.core import TyperCommand, TyperGroup

_KINDS = {"int_parsing": "a whole number", "float_parsing": "a number"}
"""What pydantic calls a wrong value, and people."""
_STEP = "-t moves from faithful to vivid, in one step"
_FOUND = "there is nothing to set: one process keeps the device busy"
_OPTIONS_INSTEAD = {
    **dict.fromkeys(("-i", "--input"), "inputs need no option: tadsr upscale photo.jpg"),
    **dict.fromkeys(("-n", "--model-name", "--model_name"), "-m names the model"),
    "--outscale": "-s is the output's size over the input's",
    "--ext": "-f is the format",
    **dict.fromkeys(("--half", "--fp16"), "--dtype fp16 is for GPUs"),
    **dict.fromkeys(("--fp32", "--no-half", "--precision"), "--dtype sets it, such as fp32"),
    **dict.fromkeys(
        ("-g", "--gpu", "--gpu-id", "--gpu-ids", "--cpu"), "--device takes cpu, cuda or cuda:N"
    ),
    **dict.fromkeys(
        ("--tile-size", "--tile_size", "--tile_pad", "--tile_overlap"),
        "--tile and --max-memory set it",
    ),
    "--face_enhance": "--timestep-map keeps faces faithful",
    **dict.fromkeys(("--denoise_strength", "--strength", "--fidelity", "--steps"), _STEP),
    **dict.fromkeys(("-y", "--force"), "--overwrite replaces results"),
    **dict.fromkeys(("-r", "--recursive"), "sub-folders are read anyway"),
    **dict.fromkeys(("-j", "--jobs", "--workers", "--num-workers", "--batch-size"), _FOUND),
    **dict.fromkeys(("--share", "--listen", "--server-name"), "--host 0.0.0.0 lets others in"),
    **dict.fromkeys(("-p", "--server-port"), "--port sets it"),
    **dict.fromkeys(("--lowvram", "--medvram"), "--max-memory bounds it"),
    **dict.fromkeys(("--resume", "--skip-existing"), "results that exist are skipped anyway"),
    **dict.fromkeys(("-z", "--upscale", "--factor"), "-s is the output's size over the input's"),
    **dict.fromkeys(("-w", "--resolution"), "--width and --height set it"),
    **dict.fromkeys(("--auto-launch", "--inbrowser"), "--open opens the page"),
    "--alpha_upsampler": "alpha is carried anyway",
    "--tta": "there is none; leave it out",
    "-c": "--quality sets it",
}
"""What users of other upscalers type, and what does it here."""
_COMMANDS_INSTEAD = {
    **dict.fromkeys(("i", "p", "run", "enhance", "restore"), "tadsr upscale"),
    "s": "tadsr serve",
    **dict.fromkeys(("ui", "gui", "webui"), "tadsr demo"),
    **dict.fromkeys(("d", "download"), "tadsr upscale -m owner/name, which downloads"),
    **dict.fromkeys(("finetune", "fine-tune"), "tadsr train"),
    **dict.fromkeys(("list", "models"), "tadsr info"),
    **dict.fromkeys(("onnx", "openvino"), "tadsr export onnx"),
    **{name: f"tadsr --{name}" for name in ("help", "version")},
}


class SuggestingCommand(TyperCommand):
    """A command that suggests the option that was meant."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse arguments, with a suggestion in the error for an unknown option."""
        with _suggesting_options():
            return super().parse_args(ctx, args)


class SuggestingGroup(TyperGroup):
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
        is_path = os.path.exists(name) or os.path.splitext(name)[1] != ""
        is_unknown = self.get_command(ctx, name) is None
        if is_unknown and is_path and not name.startswith("-"):
            ctx.fail(f"No such command {name!r}. Did you mean 'tadsr upscale {name}'?")
        if is_unknown and name in _COMMANDS_INSTEAD:
            ctx.fail(f"No such command {name!r}. Did you mean '{_COMMANDS_INSTEAD[name]}'?")
        return super().resolve_command(ctx, args)


@contextmanager
def _suggesting_options() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # Told by its attribute: the class lives in click or in typer, by typer's version.
        possibilities = getattr(error, "possibilities", None)
        instead = _OPTIONS_INSTEAD.get(getattr(error, "option_name", ""))
        if instead:
            error.message = f"{error.message}: {instead}"
            error.possibilities = None
        elif possibilities:
            begun = [p for p in possibilities if p.startswith(getattr(error, "option_name", "-"))]
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
