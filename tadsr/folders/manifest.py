"""What a run over many images did, one line of JSON per image, in the folder of the results."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from filelock import FileLock, Timeout

from tadsr.errors import TADSRError
from tadsr.folders.jobs import MANIFEST_NAME, Job
from tadsr.folders.outcome import Outcome
from tadsr.named_files import holds_something, parse_json
from tadsr.version import __version__

_LOCK_NAME = ".tadsr-manifest.lock"
_DIGEST_CHARACTERS = 12
_BLOCK_BYTES = 2**20
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_COUNTERS = Path("/proc/vmstat")
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


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


@dataclass
class _Beginning:
    """A note that a run began an image."""

    settings: str
    # Digest of the settings and of what an image may be too much for; None if the run cannot have
    # died of the image: it has left it by an interrupt or an error, or others compute.
    means: str | None
    started: str
    memory: str | None = None  # what `count_kills` gave


Line = TypeVar("Line", Record, _Beginning)


@dataclass
class _Contents:
    """What a manifest holds."""

    records: dict[str, Record] = field(default_factory=dict)  # by target
    known: set[str] = field(default_factory=set)  # digests of settings that are spelled out
    # By target, what has no end that a record tells.
    begun: dict[str, list[_Beginning]] = field(default_factory=lambda: defaultdict(list))
    is_cut: bool = False  # whether the last line has no end


class Manifest(AbstractContextManager):
    """The manifest of one folder, held by one run at a time."""

    def __init__(
        self,
        folder: str | Path,
        settings: Mapping[str, Any],
        means: str | None = None,
        *,
        is_locked: bool = True,
    ) -> None:
        self.folder = Path(folder)
        self.path = self.folder / MANIFEST_NAME
        self.settings = settings_digest(settings)
        self._means = settings_digest({"settings": self.settings, "means": means})
        self._begun_now: set[str] = set()
        self._lock = FileLock(self.folder / _LOCK_NAME)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(self.path) and not os.path.isfile(self.path):
                raise TADSRError(f"{self.path}: must be a file, but is a folder, pipe or device")
            if is_locked:
                self._lock.acquire(timeout=0)
            self._contents = _read(self.path)
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115, closed by close()
        except Timeout as error:
            raise TADSRError(
                f"{self.folder}: another run writes to this folder; wait for it, or choose another"
            ) from error
        except BaseException as error:
            self._lock.release()
            if isinstance(error, NotImplementedError) or (
                isinstance(error, OSError) and error.errno in _NO_LOCKS
            ):
                raise TADSRError(
                    f"{self.folder}: its file system has no locks, which keep two runs apart; "
                    "choose another, or pass --no-lock (is_locked=False) if no other run writes "
                    "to it"
                ) from error
            if isinstance(error, OSError):
                raise _cannot_hold(self.path, error) from error
            raise
        if self._contents.is_cut:
            self._file.write("\n")
        if self.settings not in self._contents.known:
            head = {"settings": self.settings, "tadsr": __version__, **settings}
            self._write({"run": head, "started": _now()})

    def find(self, target: Path) -> Record | None:
        """Return the last record of a result, or None."""
        return self._contents.records.get(self._name(target))

    def is_suspect(self, target: Path) -> bool:
        """Return whether a run was killed while computing a result."""
        return any(begun.means is not None for begun in self._begun(target))

    def num_deaths(self, target: Path) -> tuple[int, int]:
        """Count the runs with these settings and means that were killed while computing a result.

        Runs whose machine was switched off or taken away do not count.
        """
        alike = [begun for begun in self._begun(target) if begun.means == self._means]
        stayed = [begun.memory for begun in alike if not has_rebooted(begun.memory)]
        num_run_out = sum(map(has_run_out, stayed))
        return num_run_out, len(stayed) - num_run_out

    def begin(self, target: Path, *, is_deadly: bool = True) -> None:
        """Record that a result is being computed, in case this run is killed."""
        name = self._name(target)
        means = self._means if is_deadly else None
        begun = _Beginning(self.settings, means, _now(), count_kills())
        self._write({"begun": name, **asdict(begun)})
        self._contents.begun[name].append(begun)
        self._begun_now.add(name)

    def add(self, outcome: Outcome) -> None:
        """Record one image's outcome."""
        is_written = outcome.status == "written"
        self._add(
            outcome.job,
            source_bytes=outcome.source_bytes,
            source_sha256=outcome.source_sha256,
            settings=self.settings,
            finished=_now(),
            seconds=round(outcome.seconds, 3),
            target_bytes=_size_of(outcome.job.target) if is_written else None,
            width=outcome.size[0] if is_written else None,
            height=outcome.size[1] if is_written else None,
            error=None if is_written else outcome.message,
        )

    def adopt(self, job: Job, size: tuple[int, int] | tuple[None, None]) -> None:
        """Record a result that a killed run finished but could not record."""
        begun = self._begun(job.target)
        try:
            made = os.path.getmtime(job.target)
        except OSError:  # somebody has taken it away already
            return
        if not begun or made < datetime.fromisoformat(begun[-1].started).timestamp():
            return
        source_bytes, source_sha256 = fingerprint(job.source)
        self._add(
            job,
            source_bytes=source_bytes,
            source_sha256=source_sha256,
            settings=begun[-1].settings,
            finished=datetime.fromtimestamp(made, timezone.utc).isoformat(timespec="seconds"),
            seconds=0.0,
            target_bytes=_size_of(job.target),
            width=size[0],
            height=size[1],
        )

    def close(self) -> None:
        """Close the file and let other runs have the folder."""
        try:
            # An error or an interrupt is no death.
            for name in sorted(self._begun_now):
                self._write({"left": name})
        except TADSRError:
            pass  # a full disk, say, which has ended the run by now
        finally:
            with suppress(OSError):
                self._file.close()
            self._lock.release()

    def __exit__(self, *error: object) -> None:
        self.close()

    def _begun(self, target: Path) -> list[_Beginning]:
        return self._contents.begun.get(self._name(target), [])

    def _add(self, job: Job, **about: Any) -> None:
        name = self._name(job.target)
        record = Record(target=name, source=job.source.as_posix(), **about)
        self._write(asdict(record))
        self._begun_now.discard(name)
        self._contents.begun.pop(name, None)
        self._contents.records[name] = record

    def _name(self, target: Path) -> str:
        return Path(os.path.relpath(target, self.folder)).as_posix()

    def _write(self, line: Mapping[str, Any]) -> None:
        # One write for a line and its end: a killed run leaves whole lines, but for the last.
        # ASCII: a name on disk may be no text at all, or hold what some call the end of a line.
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise _cannot_hold(self.path, error) from error


def _cannot_hold(path: Path, error: OSError) -> TADSRError:
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    hint = "free some space and run again, which goes on from here" if is_full else "choose another"
    reason = error.strerror or error
    return TADSRError(
        f"{path}: the output folder must hold a record of the run, got: {reason}; {hint}"
    )


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
    """Read the last record of every image."""
    return list(_read(Path(folder) / MANIFEST_NAME).records.values())


def _read(path: Path) -> _Contents:
    contents = _Contents()
    if not holds_something(path):
        return contents
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            contents.is_cut = not line.endswith("\n")
            try:
                _take(parse_json(line), contents)
            except (
                *(ValueError, TypeError, KeyError, IndexError, AttributeError),
                *(OverflowError, OSError),  # of a time that cannot be
            ):
                continue  # a line that was cut off by a power failure, or is none of ours
    return contents


def _take(entry: dict[str, Any], contents: _Contents) -> None:
    if "run" in entry:
        contents.known.add(entry["run"]["settings"])
    elif "begun" in entry:
        times = (entry["started"], entry.get("memory"))
        begun = _checked(_Beginning(entry["settings"], entry["means"], *times))
        datetime.fromisoformat(begun.started).timestamp()
        contents.begun[entry["begun"]].append(begun)
    elif "left" in entry:
        contents.begun[entry["left"]][-1].means = None
    else:
        # Fields of later versions are no matter.
        known = {each.name for each in fields(Record)}
        record = _checked(Record(**{k: v for k, v in entry.items() if k in known}))
        contents.records[record.target] = record
        contents.begun.pop(record.target, None)


def _checked(line: Line) -> Line:
    """Return a line whose values are of their fields' types, or raise TypeError."""
    for name, hint in _hints(type(line)).items():
        if not isinstance(getattr(line, name), float | int if hint is float else hint):
            raise TypeError(f"{name} must be {hint}, got {getattr(line, name)!r}")
    return line


_hints = functools.cache(get_type_hints)


def fingerprint(path: Path) -> tuple[int, str] | tuple[None, None]:
    """Return a file's size in bytes and its SHA-256; None for one that cannot be read."""
    if not holds_something(path):
        return None, None
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


def count_kills() -> str | None:
    """Return a marker of this boot and how often memory ran out in it; None if unknown."""
    try:
        boot = _BOOT.read_text(encoding="ascii").strip()
        lines = dict(line.split() for line in _COUNTERS.read_text(encoding="ascii").splitlines())
        return f"{boot} {lines['oom_kill']}"
    except (OSError, ValueError, KeyError):  # not Linux
        return None


def has_rebooted(mark: object) -> bool:
    """Return whether a marker is from another machine or an earlier boot."""
    now = count_kills()
    return now is not None and isinstance(mark, str) and mark.split()[:1] != now.split()[:1]


def has_run_out(mark: object) -> bool:
    """Return whether memory ran out on this machine since a marker."""
    now = count_kills()
    if now is None or not isinstance(mark, str) or has_rebooted(mark):
        return False
    return mark.rpartition(" ")[2] != now.rpartition(" ")[2]
