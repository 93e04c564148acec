"""A run over many images on one device: the next is read and the last written meanwhile."""

from __future__ import annotations

import errno
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from tadsr.errors import ImageWriteError, TADSRError
from tadsr.folders.jobs import Job
from tadsr.folders.manifest import fingerprint
from tadsr.folders.outcome import Outcome
from tadsr.folders.restoring import (
    FileRequest,
    images_at_once,
    note_about,
    num_frames,
    read_input,
    restore,
    restore_together,
)
from tadsr.progress import Progress

if TYPE_CHECKING:
    from tadsr.folders.restoring import SourceImage
    from tadsr.restorer import Restorer

FAILURES = (TADSRError, ValueError, TypeError, OSError, RuntimeError, MemoryError)
"""What one image may fail with while the others go on; torch raises RuntimeError where memory
runs out, among other things."""

_MAX_WRITERS = 4
"""Pictures are encoded by one core each; the other cores belong to who runs this."""
_ALONE_PIXELS = 2**25
"""A result of more pixels is written before the next is computed, for both to be in memory at
once would cost more than the overlap gains."""
_MAX_BATCHES_AT_ONCE = 2
_AHEAD_PIXELS = 2**24
"""Inputs that wait for the computation hold so many pixels together at most, or are one."""
_POLL_SECONDS = 0.02
_FULL = (errno.ENOSPC, errno.EDQUOT)

Report = Callable[[Outcome], None]
ProgressOf = Callable[[Job], Progress]


@dataclass
class Pace:
    """How long a run waited for each stage, which tells the one that bounds it."""

    computing: float = 0.0
    """Seconds of the networks, and of decoding and encoding where nothing is computed meanwhile."""
    reading: float = 0.0
    """Seconds in which no image had been read yet."""
    writing: float = 0.0
    """Seconds in which too many results waited to be written."""

    @property
    def seconds(self) -> float:
        """The total."""
        return self.computing + self.reading + self.writing

    def described(self) -> str:
        """Return the shares as a line."""
        seconds = self.seconds
        shares = {
            "computing": self.computing,
            "waiting for images to be read": self.reading,
            "for results to be written": self.writing,
        }
        parts = (f"{100 * s / max(seconds, 1e-9):.0f} % {name}" for name, s in shares.items())
        return f"{seconds:.1f} s: {', '.join(parts)}"

    def add(self, other: Pace) -> None:
        """Add the seconds of another run, or of a part of it."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))

    def take(self) -> Pace:
        """Return the seconds so far and reset them."""
        taken = replace(self)
        self.computing = self.reading = self.writing = 0.0
        return taken

    @contextmanager
    def measure(self, stage: Literal["computing", "reading", "writing"]) -> Iterator[None]:
        """Add a block's seconds to a stage's."""
        started = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, stage, getattr(self, stage) + time.perf_counter() - started)


@dataclass
class _Item:
    """An image being processed."""

    job: Job
    image: SourceImage | None = None
    pixels: int = 0
    error: BaseException | None = None
    seconds: float = 0.0
    about: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add a block's seconds to the image's."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started


class _ReadAhead(AbstractContextManager):
    """Reads images ahead in a thread: one, or as many as were asked for together last."""

    def __init__(self, jobs: Iterable[Job], request: FileRequest) -> None:
        self._jobs, self._request = jobs, request
        self._items: deque[_Item | None] = deque()
        self._changed = threading.Condition()
        self._is_stopped = False
        self._num_ahead = 1
        # A daemon: the source of jobs may wait for ever when the run is broken off.
        threading.Thread(target=self._run, name="tadsr-read", daemon=True).start()

    def wait(self) -> bool:
        """Wait briefly for the next image; return whether there is one."""
        with self._changed:
            if not self._items:
                # In steps, so that an interrupt is seen.
                self._changed.wait(_POLL_SECONDS)
            return bool(self._items)

    def next(self) -> _Item | None:
        """Return the next image that `wait` found, or None after the last."""
        with self._changed:
            self._changed.notify_all()
            return self._items.popleft()

    def batch(self, first: _Item, most: int) -> list[_Item]:
        """Return an image with those of the next that may share a batch with it, and read more."""
        found = [first]
        with self._changed:
            while len(found) < most and self._items and _may_share(first, self._items[0]):
                found.append(self._items.popleft())
            self._num_ahead = most
            self._changed.notify_all()
        return found

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            for job in self._jobs:
                if self._is_stopped:
                    break
                self._put(_read(job, self._request))
        finally:
            self._put(None)

    def _put(self, item: _Item | None) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_stopped or self._has_room(item))
            self._items.append(item)
            self._changed.notify_all()

    def _has_room(self, item: _Item | None) -> bool:
        pixels = sum(each.pixels for each in (item, *self._items) if each)
        return not self._items or (pixels <= _AHEAD_PIXELS and len(self._items) < self._num_ahead)


def _may_share(first: _Item, other: _Item | None) -> bool:
    if other is None or first.image is None or other.image is None:
        return False
    items = (first, other)
    is_still = all(num_frames(item.image) == 1 and not item.job.alone for item in items)
    return is_still and first.image.size == other.image.size


def _read(job: Job, request: FileRequest) -> _Item:
    item = _Item(job)
    with item.timed():
        try:
            item.image = read_input(job, request)
            count = num_frames(item.image)
            item.pixels = item.image.size[0] * item.image.size[1] * count
            size, digest = fingerprint(job.source)
            item.about = {"source_bytes": size, "source_sha256": digest}
            item.about |= {"num_frames": count, "note": note_about(job, request)}
        # All of them: the thread must live on, and what is no failure is raised by the run.
        except BaseException as error:
            item.error = error
    return item


def run_files(
    jobs: Iterable[Job],
    request: FileRequest,
    load: Callable[[], Restorer],
    report: Report,
    progress_of: ProgressOf | None = None,
    pace: Pace | None = None,
) -> Pace:
    """Upscale files; one that fails leaves the others alone.

    Reading the next files and writing the last ones overlap with the computation, one result more
    waiting at most than are written at once. What has been read and is of one size goes through a
    GPU together, and meanwhile the images before and after are encoded and decoded. Interrupted,
    what is being written is finished first.
    """
    pipe, max_batches = None, 1
    begin = getattr(report, "begin", lambda job: None)
    pace = pace or Pace()
    num_writers = max(1, min(_MAX_WRITERS, (os.cpu_count() or 1) // 2))
    with (
        ThreadPoolExecutor(num_writers, "tadsr-write") as writers,
        ThreadPoolExecutor(_MAX_BATCHES_AT_ONCE, "tadsr-compute") as threads,
        _ReadAhead(jobs, request) as reader,
    ):
        results = _Results(request, report, writers)
        try:
            while True:
                with pace.measure("writing"):
                    results.report_written(num_writers)
                with pace.measure("reading"):
                    while not reader.wait():
                        # Who sends the jobs may wait for results before there are more.
                        results.take_finished()
                    item = reader.next()
                if item is None:
                    break
                if item.image is None:
                    results.report_failure(item, item.error)
                    continue
                if pipe is None:
                    # Outside of what may fail: without a model there is no point in the next file.
                    pipe = load()
                    # A GPU computes one while others are decoded and encoded.
                    max_batches = _MAX_BATCHES_AT_ONCE if pipe.device.type == "cuda" else 1
                is_large = item.pixels * request.settings_for(item.image).scale ** 2 > _ALONE_PIXELS
                is_alone = is_large or item.job.alone
                num_left = 0 if is_alone else max_batches - 1
                at_once = images_at_once(pipe, item.image, request)
                batch = reader.batch(item, at_once)
                with pace.measure("computing"):
                    results.take_computed(num_left)
                    for one in batch:
                        begin(one.job)
                    arguments = (pipe, batch, request, progress_of)
                    if max_batches == 1:
                        # In this thread, where an interrupt ends it at once.
                        computed = _done(_restore_batch(*arguments))
                    else:
                        computed = threads.submit(_restore_batch, *arguments)
                    results.add(batch, computed)
                    results.take_computed(num_left)
                if is_alone:
                    with pace.measure("writing"):
                        results.report_written(0)
            with pace.measure("computing"):
                results.take_computed(0)
        finally:
            results.report_written(0)
    return pace


def _restore_batch(
    pipe: Restorer, batch: Sequence[_Item], request: FileRequest, progress_of: ProgressOf | None
) -> list[Any]:
    """Return each image's result, or what was raised."""
    if len(batch) > 1:
        started = time.perf_counter()
        try:
            results = restore_together(pipe, [item.image for item in batch], request)
        except FAILURES:
            pass  # of one of them: each by itself tells which
        else:
            for item in batch:
                item.seconds += (time.perf_counter() - started) / len(batch)
            return results
    results = []
    for item in batch:
        progress = progress_of(item.job) if progress_of else None
        with item.timed():
            try:
                results.append(restore(pipe, item.image, item.job, request, progress))
            except FAILURES as error:
                results.append(error)
    return results


def explain(job: Job, error: BaseException) -> str:
    """Return what went wrong with an image, as one line that names it."""
    message = str(error) or type(error).__name__
    if isinstance(error, MemoryError) or ("memory" in message and "alloc" in message):
        message = f"{message.splitlines()[0]}; try --max-memory, a smaller --scale or --dtype"
    is_named = message.startswith((str(job.source), str(job.target)))
    return message if is_named else f"{job.source}: {message}"


class _Results:
    """Batches in computation and results in writing, reported in their order."""

    def __init__(self, request: FileRequest, report: Report, writers: ThreadPoolExecutor) -> None:
        self._request, self._report, self._writers = request, report, writers
        self._computed: deque[tuple[Sequence[_Item], Future]] = deque()
        self._written: deque[tuple[_Item, Future]] = deque()

    def add(self, batch: Sequence[_Item], computed: Future) -> None:
        """Take a batch whose results are to come."""
        self._computed.append((batch, computed))

    def take_computed(self, num_left: int) -> None:
        """Wait for batches until no more than a number are in computation, and write them."""
        while len(self._computed) > num_left:
            batch, computed = self._computed.popleft()
            for item, result in zip(batch, computed.result(), strict=True):
                if isinstance(result, BaseException):
                    self.report_failure(item, result)
                    continue
                # A result that was written at once is gone already.
                size = self._request.output_size(item.image) if result is None else result.size
                item.about["size"] = size
                item.image = None
                written = self._writers.submit(_write, result, item, self._request)
                self._written.append((item, written))

    def report_written(self, num_left: int) -> None:
        """Wait for writes until no more than a number are pending."""
        while len(self._written) > num_left:
            item, written = self._written[0]
            error = written.exception()
            # An interrupt while that waits leaves it to be reported at the end.
            self._written.popleft()
            if error is None:
                self._report(Outcome(item.job, "written", item.seconds, **item.about))
                continue
            self.report_failure(item, error)

    def take_finished(self) -> None:
        """Take the batches and report the writes that have finished, in order."""
        while self._computed and self._computed[0][1].done():
            self.take_computed(len(self._computed) - 1)
        while self._written and self._written[0][1].done():
            self.report_written(len(self._written) - 1)

    def report_failure(self, item: _Item, error: BaseException | None) -> None:
        """Report a failed image, and end the run if all others would fail too."""
        if not isinstance(error, FAILURES):
            raise error
        about = {**item.about, "size": None}
        message = explain(item.job, error)
        trace = "".join(traceback.format_exception(error))
        outcome = Outcome(
            item.job, "failed", item.seconds, message=message, traceback=trace, **about
        )
        self._report(outcome)
        if _is_disk_full(error):
            raise ImageWriteError(
                f"{item.job.target}: no space is left to write to; free some and run the same "
                "command again, which goes on from here"
            ) from error


def _done(result: Any) -> Future:
    future: Future = Future()
    future.set_result(result)
    return future


def _write(result: SourceImage | None, item: _Item, request: FileRequest) -> None:
    with item.timed():
        if result is not None:
            from tadsr.images import write_image

            write_image(result, item.job.target, **request.writing(item.job))
        if request.keeps_dates:
            found = os.stat(item.job.source)
            os.utime(item.job.target, ns=(found.st_atime_ns, found.st_mtime_ns))


def _is_disk_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        error = error.__cause__
    return False
