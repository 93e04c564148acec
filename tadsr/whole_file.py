"""Files that appear whole or not at all: written under another name first, then renamed."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tadsr.errors import reason_of
from tadsr.named_files import check_is_file

_PARTIAL = re.compile(r"\.tadsr-(?P<host>[0-9a-f]{8})-(?P<process>\d+)-[0-9a-f]{32}(\..*)?")


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary name beside a file; it is renamed to the file if all goes well.

    Raises:
        OSError: The file or its folder cannot be written.
    """
    target = Path(os.path.realpath(path))
    if os.path.exists(target):
        check_is_file(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    name = f".tadsr-{_host()}-{os.getpid()}-{uuid.uuid4().hex}{target.suffix}"
    partial = target.with_name(name)
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)  # gone already after success; left by any failure


def why_unwritable(folder: str | os.PathLike[str]) -> str | None:
    """Return why no file can be made in a folder that exists or is to be made, or None."""
    folder = Path(folder)
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        return f"{folder} is not a folder"
    try:  # permissions do not tell
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"the folder {folder} is not writable ({reason_of(error)})"


def remove_abandoned(folder: Path) -> None:
    """Remove half-written files that killed processes of this machine left in a folder."""
    with suppress(OSError):
        for path in folder.glob(".tadsr-*"):
            found = _PARTIAL.fullmatch(path.name)
            if found and found["host"] == _host() and not _is_alive(int(found["process"])):
                path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        # Killed, but not yet taken note of by the process that started it.
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _host() -> str:
    """Return a short name of this machine that fits into file names."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]
