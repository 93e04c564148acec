"""Answer a mistyped command or option with the one that was probably meant."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from typer.core import TyperCommand, TyperGroup

_KINDS = {"int_parsing": "a whole number", "float_parsing": "a number"}
"""What pydantic calls a wrong value, and people."""


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
        with _suggesting_options():
            return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        """Find the command, with a suggestion in the error for an unknown one."""
        name = args[0]
        is_path = os.path.exists(name) or os.path.splitext(name)[1] != ""
        if self.get_command(ctx, name) is None and is_path and not name.startswith("-"):
            ctx.fail(f"No such command {name!r}. Did you mean 'tadsr upscale {name}'?")
        if name in ("help", "version"):
            ctx.fail(f"No such command {name!r}. Did you mean 'tadsr --{name}'?")
        return super().resolve_command(ctx, args)


@contextmanager
def _suggesting_options() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # Told by its attribute: the class lives in click or in typer, by typer's version.
        possibilities = getattr(error, "possibilities", None)
        if possibilities:
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
