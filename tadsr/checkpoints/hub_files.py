"""Fetch files of a hub repository into its cache: resumed where cut, checked by their hash."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TypeVar

from huggingface_hub import constants, hf_hub_download, hf_hub_url
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import WeakFileLock, build_hf_headers

from tadsr.errors import CheckpointError
from tadsr.named_files import check_is_file, holds_something

WAITS_S = (1, 2, 4, 8)
"""Seconds before each further attempt; those that brought enough do not count."""
_ENOUGH_BYTES = 2**16
_MAX_WAIT_S = 60
UNREADABLE = (TypeError, ValueError, LookupError, AttributeError, RecursionError)
"""What the hub's library raises at an answer of another form than it expects."""
_PASSING_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Snapshot:
    """A commit of a repository in the hub's cache."""

    repo_id: str
    commit: str
    cache_dir: Path | None = None
    token: str | bool | None = None

    def __post_init__(self) -> None:
        path = PurePosixPath(self.commit)
        is_path = path.is_absolute() or not path.parts or ".." in path.parts
        if is_path or "\0" in self.commit or "\\" in self.commit:
            raise CheckpointError(
                f"a revision must be a branch, tag or commit, got {self.commit!r}; check its name"
            )

    @classmethod
    def in_cache(
        cls, repo_id: str, revision: str | None, cache_dir: Path | None
    ) -> Snapshot | None:
        """Return what a branch, tag or commit meant when there was a connection last, or None."""
        named = cls(repo_id, revision or constants.DEFAULT_REVISION, cache_dir)
        reference = named._storage / "refs" / named.commit
        if holds_something(reference):
            commit = reference.read_bytes().decode(errors="replace").strip()
            named = replace(named, commit=commit)
        return named if os.path.isdir(named.folder) else None

    @property
    def _storage(self) -> Path:
        cache = self.cache_dir or Path(constants.HF_HUB_CACHE)
        return cache / repo_folder_name(repo_id=self.repo_id, repo_type="model")

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return self._storage / "snapshots" / self.commit

    def files(self) -> list[str]:
        """Return the names of the files that are there."""
        return [
            p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file()
        ]

    def fetch(self, files: Sequence[RepoSibling]) -> None:
        """Fetch the files that are not there yet, whole and with the hashes that the hub lists."""
        for file in files:
            if file.size is not None and not (isinstance(file.size, int) and file.size >= 0):
                raise CheckpointError(
                    f"{file.rfilename} must be listed with a size in bytes, got {file.size!r}; use "
                    "another hub"
                )
        missing = sorted((f for f in files if not self._has(f)), key=lambda f: f.size or 0)
        self._check_room(sum(f.size or 0 for f in missing))
        for file in missing:
            if file.lfs is not None:
                self._fetch_blob(file)
            path = Path(
                retry(
                    lambda name=file.rfilename: hf_hub_download(
                        self.repo_id,
                        name,
                        revision=self.commit,
                        cache_dir=self.cache_dir,
                        token=self.token,
                    )
                )
            )
            if file.lfs is None and file.blob_id is not None:
                _check_hash(path, file)

    def refer(self, revision: str) -> None:
        """Let a branch or tag mean this commit when there is no connection."""
        if revision != self.commit:
            reference = self._storage / "refs" / revision
            reference.parent.mkdir(parents=True, exist_ok=True)
            reference.write_text(self.commit, encoding="utf-8")

    def _has(self, file: RepoSibling) -> bool:
        """Tell whether a file is there; one of another size or kind is damaged and removed."""
        blobs = [] if file.lfs is None else [self._blob(file)]
        found = False
        for path in (*blobs, self.folder / file.rfilename):
            found = path.is_file() and file.size in (None, path.stat().st_size)
            if not found and os.path.lexists(path):
                _remove(path)
        return found

    def _blob(self, file: RepoSibling) -> Path:
        if not re.fullmatch("[0-9a-f]{64}", str(file.lfs.sha256)):  # it could be any path
            raise CheckpointError(
                f"{file.rfilename} must be listed with a SHA-256, got {file.lfs.sha256!r}; use "
                "another hub"
            )
        return self._storage / "blobs" / file.lfs.sha256

    def _check_room(self, needed: int) -> None:
        place = self._storage
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        if needed > free:
            raise CheckpointError(
                f"{self._storage} must have room for {needed / 1e9:.1f} GB, but has "
                f"{free / 1e9:.1f} GB; give another cache_dir or set HF_HOME"
            )

    def _fetch_blob(self, file: RepoSibling) -> None:
        """Fetch a large file to where the hub's library looks for it before it downloads."""
        blob = self._blob(file)
        blob.parent.mkdir(parents=True, exist_ok=True)
        partial = blob.with_name(f"{blob.name}.incomplete")
        url = hf_hub_url(self.repo_id, file.rfilename, revision=self.commit)
        # A compressed answer cannot be resumed.
        headers = build_hf_headers(token=self.token) | {"Accept-Encoding": "identity"}

        is_resumed = False

        def attempt() -> None:
            nonlocal is_resumed
            with open(partial, "ab") as out:
                begin = out.tell()
                if file.size is not None and begin > file.size:  # no beginning of this file
                    out.truncate(begin := 0)
                is_resumed |= begin > 0
                http_get(
                    url,
                    out,
                    resume_size=begin,
                    headers=headers,
                    expected_size=file.size,
                    displayed_filename=file.rfilename,
                )

        locks = self._storage.parent / ".locks" / self._storage.name
        locks.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(locks / f"{blob.name}.lock"):
            if blob.is_file():  # another process was first
                return
            if partial.exists():
                check_is_file(partial)

            def fetch() -> None:
                retry(attempt, progress=lambda: partial.stat().st_size if partial.exists() else 0)
                _check_hash(partial, file)

            try:
                fetch()
            except CheckpointError:
                if not is_resumed:
                    raise
                fetch()  # what it went on from was no beginning of this file
            os.replace(partial, blob)


def status_of(error: BaseException | None) -> int | None:
    """Return the status of the answer that an error comes from; None where there was no answer."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return int(status)
        error = error.__cause__
    return None


def may_pass(error: Exception) -> bool:
    """Tell whether another attempt may bring what this one did not."""
    status = status_of(error)
    if status is not None:
        return status in _PASSING_STATUSES
    # A number is the operating system's: no space, no permission.
    is_local = isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError)
    return not is_local and not isinstance(error, (CheckpointError, *UNREADABLE))


def retry(
    call: Callable[[], _Result],
    *,
    progress: Callable[[], int] = lambda: 0,
    again: Callable[[Exception], bool] = may_pass,
) -> _Result:
    """Call again where what went wrong may pass, or raise what `call` raised last."""
    waits = iter(WAITS_S)
    while True:
        begin = progress()
        try:
            return call()
        except Exception as error:  # each HTTP library raises its own types
            if progress() - begin >= _ENOUGH_BYTES:
                waits = iter(WAITS_S)
            wait = next(waits, None) if again(error) else None
            if wait is None:
                raise
            time.sleep(_asked_wait(error) or wait)


def _asked_wait(error: Exception) -> float | None:
    headers = getattr(getattr(error, "response", None), "headers", {})
    text = str(headers.get("Retry-After", ""))
    return min(int(text), _MAX_WAIT_S) if text.isdecimal() else None


def _check_hash(path: Path, file: RepoSibling) -> None:
    """Remove a file and raise CheckpointError if its content is not what the hub lists."""
    if file.lfs is not None:
        hasher, expected = hashlib.sha256(), file.lfs.sha256
    else:
        hasher, expected = hashlib.sha1(b"blob %d\0" % path.stat().st_size), file.blob_id
    with open(path, "rb") as content:
        while block := content.read(2**20):
            hasher.update(block)
    if hasher.hexdigest() != expected:
        _remove(path)
        raise CheckpointError(
            f"{file.rfilename} must have the hash that the hub lists ({expected}), but arrived "
            "damaged and was removed; load it again to fetch it again"
        )


def _remove(path: Path) -> None:
    """Remove a file, and what it points to in the cache."""
    target = path.resolve()
    path.unlink(missing_ok=True)
    target.unlink(missing_ok=True)
