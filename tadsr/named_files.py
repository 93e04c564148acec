"""Files that users name, read only where nothing has to be waited for."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any


def check_is_file(path: str | os.PathLike[str]) -> int:
    """Return a file's size in bytes; raise OSError for a pipe, whose end may never come.

    The kernel's own files, of which some are waited for as well, have no bytes.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        reason = "must be a file, but is a folder, pipe or device"
        raise OSError(errno.EINVAL, reason, os.fspath(path))
    return status.st_size


def holds_something(path: str | os.PathLike[str]) -> bool:
    """Tell whether a path is a file that can be read without waiting, and is not empty."""
    return os.path.isfile(path) and os.path.getsize(path) > 0


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a text file.

    Raises:
        OSError: It is no file, or cannot be read.
        ValueError: It is not in UTF-8.
    """
    return Path(path).read_text(encoding="utf-8") if check_is_file(path) else ""


def parse_json(text: str | bytes) -> Any:
    """Parse JSON; what is nested too deeply is a ValueError too."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """Read a YAML file of plain values; raises ValueError."""
    from yaml import YAMLError

    from tadsr.plain_yaml import parse_yaml

    try:
        return parse_yaml(read_text(path))
    except (OSError, ValueError, RecursionError, YAMLError) as error:
        raise ValueError(f"{path} must be a readable YAML file: {error}") from error
