"""Images that are read in a thread of their own while others are computed."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tadsr.folders.jobs import Job
from tadsr.folders.manifest import fingerprint
from tadsr.folders.restoring import FileRequest, note_about, num_frames, read_input

if TYPE_CHECKING:
    from tadsr.folders.restoring import SourceImage

_AHEAD_PIXELS = 2**24
"""Inputs that wait for the computation hold so many pixels together at most, or are one."""
_POLL_SECONDS = 0.1


@dataclass
class Item:
    """An image being processed."""

    job: Job
    image: SourceImage | None = None
    pixels: int = 0
    error: BaseException | None = None
    seconds: float = 0.0
    about: dict[str, Any] = field(default_factory=dict)


class ReadAhead(AbstractContextManager):
    """Reads images ahead in a thread; one, unless told otherwise."""

    def __init__(self, jobs: Iterable[Job], request: FileRequest) -> None:
        self._jobs, self._request = jobs, request
        self._items: deque[Item | None] = deque()
        self._changed = threading.Condition()
        self._num_ahead = 1
        self._is_stopped = False
        # A daemon: the source of jobs may wait for ever when the run is broken off.
        threading.Thread(target=self._run, name="tadsr-read", daemon=True).start()

    def wait(self) -> bool:
        """Wait briefly for the next image or for `wake`; return whether there is an image."""
        with self._changed:
            if not self._items:
                # In steps, so that an interrupt is seen.
                self._changed.wait(_POLL_SECONDS)
            return bool(self._items)

    def wake(self) -> None:
        """End a `wait`."""
        with self._changed:
            self._changed.notify_all()

    def next(self) -> Item | None:
        """Return the next image that `wait` found, or None after the last."""
        with self._changed:
            return self._take()

    def read_ahead(self, count: int) -> None:
        """Set how many images may wait."""
        with self._changed:
            self._num_ahead = count
            self._changed.notify_all()

    def like(self, first: Item, count: int) -> list[Item]:
        """Return up to `count` of the next images that may share a batch with the first."""
        found: list[Item] = []
        with self._changed:
            while len(found) < count and self._items and _may_share(first, self._items[0]):
                found.append(self._take())
        return found

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    def _take(self) -> Item | None:
        item = self._items.popleft()
        self._changed.notify_all()
        return item

    def _run(self) -> None:
        try:
            for job in self._jobs:
                if self._is_stopped:
                    break
                self._put(_read(job, self._request))
        finally:
            self._put(None)

    def _put(self, item: Item | None) -> None:
        pixels = item.pixels if item else 0
        with self._changed:
            while self._items and not self._is_stopped:
                has_room = pixels + sum(i.pixels for i in self._items if i) <= _AHEAD_PIXELS
                if has_room and len(self._items) < self._num_ahead:
                    break
                self._changed.wait()
            self._items.append(item)
            self._changed.notify_all()


def _may_share(first: Item, other: Item | None) -> bool:
    if other is None or first.image is None or other.image is None:
        return False
    items = (first, other)
    is_still = all(num_frames(item.image) == 1 and not item.job.alone for item in items)
    return is_still and first.image.size == other.image.size


def _read(job: Job, request: FileRequest) -> Item:
    item = Item(job)
    with timed(item):
        try:
            item.image = read_input(job, request)
            width, height = item.image.size
            item.pixels = width * height * num_frames(item.image)
            about = {"num_frames": num_frames(item.image), "note": note_about(job, request)}
            size, digest = fingerprint(job.source)
            item.about = {"source_bytes": size, "source_sha256": digest, **about}
        # All of them: the thread must live on, and what is no failure is raised by the run.
        except BaseException as error:
            item.error = error
    return item


@contextmanager
def timed(item: Item) -> Iterator[None]:
    """Add a block's seconds to an image's."""
    started = time.perf_counter()
    try:
        yield
    finally:
        item.seconds += time.perf_counter() - started
