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
from dataclasses import dataclass, field
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
    write_result,
)

if TYPE_CHECKING:
    from PIL import Image

    from tadsr.folders.restoring import SourceImage
    from tadsr.image_io import ArrayImage
    from tadsr.pipeline import TADSRPipeline

FAILURES = (TADSRError, ValueError, TypeError, OSError, RuntimeError, MemoryError)
"""What one image may fail with while the others go on; torch raises RuntimeError where memory
runs out, among other things."""

_AHEAD_PIXELS = 2**24
"""Inputs that wait for the computation hold so many pixels together at most, or are one."""
_MAX_WRITERS = 4
"""Pictures are encoded by one core each; the other cores belong to who runs this."""
_ALONE_PIXELS = 2**25
"""A result of more pixels is written before the next is computed, for both to be in memory at
once would cost more than the overlap gains."""
_POLL_SECONDS = 0.1
_FULL = (errno.ENOSPC, errno.EDQUOT)

Report = Callable[[Outcome], None]
ProgressOf = Callable[[Job], Callable[[float], None]]


@dataclass
class Pace:
    """What a run waited for, which tells the stage that bounds it."""

    computing: float = 0.0
    """Seconds of the networks, and of decoding and encoding around them."""
    reading: float = 0.0
    """Seconds in which no image had been read yet."""
    writing: float = 0.0
    """Seconds in which too many results waited to be written."""

    def described(self) -> str:
        """Return the shares as a line."""
        seconds = self.computing + self.reading + self.writing
        shares = {
            "computing": self.computing,
            "waiting for images to be read": self.reading,
            "for results to be written": self.writing,
        }
        parts = (f"{100 * s / max(seconds, 1e-9):.0f} % {name}" for name, s in shares.items())
        return f"{seconds:.1f} s: {', '.join(parts)}"

    @contextmanager
    def measure(self, stage: Literal["computing", "reading", "writing"]) -> Iterator[None]:
        """Count the seconds of a stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, stage, getattr(self, stage) + time.perf_counter() - started)


@dataclass
class _Item:
    """An image on its way."""

    job: Job
    image: SourceImage | None = None
    pixels: int = 0
    error: BaseException | None = None
    seconds: float = 0.0
    about: dict[str, Any] = field(default_factory=dict)


def run_files(
    jobs: Iterable[Job],
    request: FileRequest,
    load: Callable[[], TADSRPipeline],
    report: Report,
    progress_of: ProgressOf | None = None,
) -> Pace:
    """Upscale files; one that fails leaves the others alone.

    Reading the next files and writing the last ones overlap with the computation, one result more
    waiting at most than are written at once. What has been read and is of one size goes through a
    GPU together. Interrupted, what is being written is finished first.

    Args:
        jobs: Which files; taken one at a time, from a thread of its own.
        request: What is done to each.
        load: Gives the pipeline; called when the first image has been read.
        report: Told each outcome as soon as it is known, in this thread.
        progress_of: Gives each image's progress.

    Returns:
        What the run waited for.

    Raises:
        ImageWriteError: The disk is full, so that nothing more can be written.
        TADSRError: What `load` raises.
    """
    pipe = None
    pace = Pace()
    num_writers = max(1, min(_MAX_WRITERS, (os.cpu_count() or 1) // 2))
    pending: deque[tuple[_Item, Future]] = deque()
    with ThreadPoolExecutor(num_writers, "tadsr-write") as writer, _Reader(jobs, request) as reader:
        try:
            while True:
                with pace.measure("writing"):
                    _report_written(pending, report, num_writers)
                with pace.measure("reading"):
                    while not reader.wait():
                        # Who sends the jobs may wait for results before there are more.
                        _report_finished(pending, report)
                    item = reader.next()
                if item is None:
                    break
                if item.image is None:
                    _report_failure(item, item.error, report)
                    continue
                # Outside of what may fail: without a model there is no point in the next file.
                pipe = pipe or load()
                at_once = images_at_once(pipe, item.image, request)
                batch = [item, *reader.like(item, at_once - 1)]
                reader.read_ahead(at_once)
                with pace.measure("computing"):
                    results = _restore_batch(pipe, batch, request, progress_of)
                for item, result in zip(batch, results, strict=True):
                    if isinstance(result, BaseException):
                        _report_failure(item, result, report)
                        continue
                    # A result that was written at once is gone already.
                    size = request.output_size(item.image) if result is None else result.size
                    item.about["size"] = size
                    item.image = None
                    future = writer.submit(_write, result, item, request)
                    future.add_done_callback(lambda _: reader.wake())
                    pending.append((item, future))
                if item.pixels * request.settings.scale**2 > _ALONE_PIXELS:
                    with pace.measure("writing"):
                        _report_written(pending, report, 0)
        finally:
            _report_written(pending, report, 0)
    return pace


def _restore_batch(
    pipe: TADSRPipeline,
    batch: Sequence[_Item],
    request: FileRequest,
    progress_of: ProgressOf | None,
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
        with _timed(item):
            try:
                results.append(restore(pipe, item.image, item.job, request, progress))
            except FAILURES as error:
                results.append(error)
    return results


def explain(job: Job, error: BaseException) -> str:
    """Return what went wrong with an image, as one line that names it.

    Args:
        job: Which image.
        error: What was raised.

    Returns:
        The message.
    """
    message = str(error) or type(error).__name__
    if isinstance(error, MemoryError) or ("memory" in message and "alloc" in message):
        message = f"{message.splitlines()[0]}; try --max-memory, a smaller --scale or --dtype"
    is_named = message.startswith((str(job.source), str(job.target)))
    return message if is_named else f"{job.source}: {message}"


class _Reader(AbstractContextManager):
    """A thread that reads images ahead: one, until told otherwise."""

    def __init__(self, jobs: Iterable[Job], request: FileRequest) -> None:
        self._jobs, self._request = jobs, request
        self._items: deque[_Item | None] = deque()
        self._changed = threading.Condition()
        self._num_ahead = 1
        self._is_stopped = False
        # A daemon: the source of jobs may wait for ever when the run is broken off.
        threading.Thread(target=self._run, name="tadsr-read", daemon=True).start()

    def wait(self) -> bool:
        """Wait for the next image or for `wake`, not long, and return whether there is one."""
        with self._changed:
            if not self._items:
                # In steps, so that an interrupt is seen.
                self._changed.wait(_POLL_SECONDS)
            return bool(self._items)

    def wake(self) -> None:
        """End a `wait`."""
        with self._changed:
            self._changed.notify_all()

    def next(self) -> _Item | None:
        """Return the next image that `wait` found, or None after the last."""
        with self._changed:
            return self._take()

    def read_ahead(self, count: int) -> None:
        """Have so many images wait at most."""
        with self._changed:
            self._num_ahead = count
            self._changed.notify_all()

    def like(self, first: _Item, count: int) -> list[_Item]:
        """Return the images that follow at once and may share a batch, up to a number."""
        found: list[_Item] = []
        with self._changed:
            while len(found) < count and self._items and _may_share(first, self._items[0]):
                found.append(self._take())
        return found

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    def _take(self) -> _Item | None:
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

    def _put(self, item: _Item | None) -> None:
        pixels = item.pixels if item else 0
        with self._changed:
            while self._items and not self._is_stopped:
                has_room = pixels + sum(i.pixels for i in self._items if i) <= _AHEAD_PIXELS
                if has_room and len(self._items) < self._num_ahead:
                    break
                self._changed.wait()
            self._items.append(item)
            self._changed.notify_all()


def _may_share(first: _Item, other: _Item | None) -> bool:
    if other is None or first.image is None or other.image is None:
        return False
    items = (first, other)
    is_still = all(num_frames(item.image) == 1 and not item.job.alone for item in items)
    return is_still and first.image.size == other.image.size


def _read(job: Job, request: FileRequest) -> _Item:
    item = _Item(job)
    with _timed(item):
        try:
            item.image = read_input(job, request)
            width, height = item.image.size
            item.pixels = width * height * num_frames(item.image)
            about = {"num_frames": num_frames(item.image), "note": note_about(job)}
            size, digest = fingerprint(job.source)
            item.about = {"source_bytes": size, "source_sha256": digest, **about}
        # All of them: the thread must live on, and what is no failure is raised by the run.
        except BaseException as error:
            item.error = error
    return item


def _write(result: Image.Image | ArrayImage | None, item: _Item, request: FileRequest) -> None:
    with _timed(item):
        if result is not None:
            write_result(result, item.job, request)


def _report_written(pending: deque[tuple[_Item, Future]], report: Report, num_left: int) -> None:
    """Wait for writes until no more than a number are pending."""
    while len(pending) > num_left:
        item, future = pending.popleft()
        error = future.exception()
        if error is None:
            report(Outcome(item.job, "written", item.seconds, **item.about))
            continue
        _report_failure(item, error, report)


def _report_finished(pending: deque[tuple[_Item, Future]], report: Report) -> None:
    """Report the first writes as far as they have ended."""
    while pending and pending[0][1].done():
        _report_written(pending, report, len(pending) - 1)


def _report_failure(item: _Item, error: BaseException | None, report: Report) -> None:
    if not isinstance(error, FAILURES):
        raise error
    about = {**item.about, "size": None}
    message = explain(item.job, error)
    trace = "".join(traceback.format_exception(error))
    report(Outcome(item.job, "failed", item.seconds, message=message, traceback=trace, **about))
    if _is_disk_full(error):
        raise ImageWriteError(
            f"{item.job.target}: no space is left to write to; free some and run the same "
            "command again, which goes on from here"
        ) from error


def _is_disk_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        error = error.__cause__
    return False


@contextmanager
def _timed(item: _Item) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        item.seconds += time.perf_counter() - started
