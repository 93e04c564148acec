"""What a run over many images did, one line of JSON per image, in the folder of the results."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tadsr.errors import TADSRError
from tadsr.folders.outcome import Outcome
from tadsr.version import __version__
from tadsr.whole_file import remove_abandoned

MANIFEST_NAME = "tadsr-manifest.jsonl"
_LOCK_NAME = ".tadsr-manifest.lock"
_DIGEST_CHARACTERS = 12
_BLOCK_BYTES = 2**20


@dataclass(frozen=True)
class Record:
    """One image of a run, finished or failed.

    Args:
        target: File that was written, relative to the manifest's folder, with "/".
        source: File that was read, as the run named it.
        source_bytes: Its size; None if it could not be read.
        source_sha256: Its content's hash.
        settings: Digest of the run's settings, which a line of their own spells out.
        finished: Time in UTC, ISO 8601.
        seconds: From reading to writing.
        target_bytes: Size of the result; None after a failure.
        width: Of the result in px.
        height: Of the result in px.
        error: What went wrong, or None.
    """

    target: str
    source: str
    source_bytes: int | None
    source_sha256: str | None
    settings: str
    finished: str
    seconds: float
    target_bytes: int | None = None
    width: int | None = None
    height: int | None = None
    error: str | None = None


class Manifest(AbstractContextManager):
    """The manifest of one folder, held by one run at a time.

    Args:
        folder: Folder of the results; made if it is missing.
        settings: What the results depend on, as JSON's types.

    Raises:
        TADSRError: Another run writes to the folder.
        OSError: The folder cannot be written.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / MANIFEST_NAME
        self.settings = settings_digest(settings)
        self._lock = FileLock(self.folder / _LOCK_NAME)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise TADSRError(
                f"{self.folder}: another run writes to this folder; wait for it, or choose another"
            ) from error
        try:
            self._records, known, is_cut = _read(self.path)
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115, closed by close()
        except BaseException:
            self._lock.release()
            raise
        if is_cut:
            self._file.write("\n")
        if self.settings not in known:
            head = {"settings": self.settings, "tadsr": __version__, **settings}
            self._write({"run": head, "started": _now()})

    def find(self, target: Path) -> Record | None:
        """Return the last record of a result, or None."""
        return self._records.get(self._name(target))

    def add(self, outcome: Outcome) -> None:
        """Write down one image.

        Args:
            outcome: What became of it.

        Raises:
            OSError: The manifest cannot be written.
        """
        job, is_written = outcome.job, outcome.status == "written"
        record = Record(
            target=self._name(job.target),
            source=job.source.as_posix(),
            source_bytes=outcome.source_bytes,
            source_sha256=outcome.source_sha256,
            settings=self.settings,
            finished=_now(),
            seconds=round(outcome.seconds, 3),
            target_bytes=_size_of(job.target) if is_written else None,
            width=outcome.size[0] if is_written else None,
            height=outcome.size[1] if is_written else None,
            error=None if is_written else outcome.message,
        )
        self._write(asdict(record))
        self._records[record.target] = record

    def remove_abandoned(self, targets: Iterable[Path]) -> None:
        """Remove half-written files of killed runs beside the results."""
        for folder in {target.parent for target in targets}:
            remove_abandoned(folder)

    def close(self) -> None:
        """Close the file and let other runs have the folder."""
        self._file.close()
        self._lock.release()

    def __exit__(self, *error: object) -> None:
        self.close()

    def _name(self, target: Path) -> str:
        return Path(os.path.relpath(target, self.folder)).as_posix()

    def _write(self, line: Mapping[str, Any]) -> None:
        # One write for a line and its end: a killed run leaves whole lines, but for the last.
        # ASCII: a name on disk may be no text at all, or hold what some call the end of a line.
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def _size_of(path: Path) -> int | None:
    try:
        return os.path.getsize(path)
    except OSError:  # somebody has taken it away already
        return None


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Return a short hash of what results depend on."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGEST_CHARACTERS]


def is_changed(record: Record, source: Path) -> bool:
    """Return whether a file differs from the one that a result was made of."""
    try:
        if os.path.getsize(source) != record.source_bytes:
            return True
    except OSError:  # a link to nothing, say
        return True
    return fingerprint(source)[1] != record.source_sha256


def read_manifest(folder: str | Path) -> list[Record]:
    """Read the last record of every image.

    Args:
        folder: Folder of the results.

    Returns:
        One record per result, in the order in which they first came; empty without a manifest.
    """
    return list(_read(Path(folder) / MANIFEST_NAME)[0].values())


def _read(path: Path) -> tuple[dict[str, Record], set[str], bool]:
    """Return records by target, the settings that are spelled out, and if the end is cut off."""
    records: dict[str, Record] = {}
    known: set[str] = set()
    names = {field.name for field in fields(Record)}
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return records, known, False
    for line in text.split("\n"):
        try:
            entry = json.loads(line)
            if "run" in entry:
                known.add(entry["run"]["settings"])
            else:
                # Fields of later versions are no matter.
                record = Record(**{k: v for k, v in entry.items() if k in names})
                records[record.target] = record
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue  # a line that was cut off by a power failure, or is none of ours
    return records, known, bool(text) and not text.endswith("\n")


def fingerprint(path: Path) -> tuple[int, str] | tuple[None, None]:
    """Return a file's size in bytes and its SHA-256; None for one that cannot be read."""
    try:
        with open(path, "rb") as file:
            digest = hashlib.sha256()
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
            return file.tell(), digest.hexdigest()
    except OSError:
        return None, None


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
