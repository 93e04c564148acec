"""Read the JSON files of a checkpoint, and check paths to files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tadsr.errors import CheckpointError
from tadsr.named_files import check_is_file, parse_json

AGAIN = "download or copy it again"
"""What to do about a damaged file, for errors."""
MAX_SMALL_BYTES = 2**26
"""Longest configuration, index or vocabulary that is read."""


def check_file(path: Path) -> None:
    """Raise CheckpointError unless a path is a file that holds something."""
    try:
        is_empty = check_is_file(path) == 0
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} must exist, but is missing; {AGAIN}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if is_empty:
        raise CheckpointError(f"{path} must be a file with content, but is empty; {AGAIN}")


def user_path(path: str | Path) -> Path:
    """Return a path that a user gave, with its "~" replaced; raises CheckpointError."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # "~nobody"
        raise CheckpointError(f"{path} must be a path, but {error}") from error


def read_small(path: Path) -> bytes:
    """Read a file that is no weights."""
    check_file(path)
    if path.stat().st_size > MAX_SMALL_BYTES:
        raise CheckpointError(f"{path} must have at most {MAX_SMALL_BYTES / 1e6:g} MB")
    return path.read_bytes()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        data = parse_json(read_small(path).decode())
    except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        raise CheckpointError(f"{path} must be JSON, but cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(data).__name__}")
    return data
