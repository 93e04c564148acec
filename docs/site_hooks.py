"""Pages of the site that are made from the repository: the changelog and the command line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command
from typer.testing import CliRunner

from tadsr.cli import app

ROOT = Path(__file__).parent.parent


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill the pages that hold only a heading; mkdocs calls this for every page."""
    if page.file.src_uri == "changelog.md":
        return (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("](docs/", "](")
    if page.file.src_uri == "cli.md":
        return "\n".join([markdown, *_commands()])
    return markdown


def _commands() -> Iterator[str]:
    for name, command in get_command(app).commands.items():
        for words in [[name], *([name, inner] for inner in getattr(command, "commands", ()))]:
            arguments = [*words, "--help"]
            text = CliRunner().invoke(app, arguments, prog_name="tadsr", terminal_width=90).stdout
            yield f"## tadsr {' '.join(words)}\n\n```text\n{text.strip()}\n```\n"
