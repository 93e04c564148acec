"""A run over many images on one device: the next is read and the last written meanwhile."""

from __future__ import annotations

import errno
import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tadsr.errors import ImageWriteError, TADSRError
from tadsr.folders.jobs import Job
from tadsr.folders.manifest import fingerprint
from tadsr.folders.outcome import Outcome
from tadsr.folders.restoring import (
    FileRequest,
    note_about,
    num_frames,
    read_input,
    restore,
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

_READ_AHEAD = 1
_WRITES_PENDING = 2
_ALONE_PIXELS = 2**25
"""A result of more pixels is written before the next is computed, for both to be in memory at
once would cost more than the overlap gains."""
_POLL_SECONDS = 0.1
_FULL = (errno.ENOSPC, errno.EDQUOT)

Report = Callable[[Outcome], None]
ProgressOf = Callable[[Job], Callable[[float], None]]


@dataclass
class _Item:
    """An image on its way."""

    job: Job
    image: SourceImage | None = None
    error: BaseException | None = None
    seconds: float = 0.0
    about: dict[str, Any] = field(default_factory=dict)


def run_files(
    jobs: Iterable[Job],
    request: FileRequest,
    load: Callable[[], TADSRPipeline],
    report: Report,
    progress_of: ProgressOf | None = None,
) -> None:
    """Upscale files one after the other; a file that fails leaves the others alone.

    Reading the next file and writing the last overlap with the computation, two results waiting
    at most. Interrupted, what is being written is finished first.

    Args:
        jobs: Which files; taken one at a time, from a thread of its own.
        request: What is done to each.
        load: Gives the pipeline; called when the first image has been read.
        report: Told each outcome as soon as it is known, in this thread.
        progress_of: Gives each image's progress.

    Raises:
        ImageWriteError: The disk is full, so that nothing more can be written.
        TADSRError: What `load` raises.
    """
    pipe = None
    pending: deque[tuple[_Item, Future]] = deque()
    with ThreadPoolExecutor(1, "tadsr-write") as writer, _Reader(jobs, request) as reader:
        try:
            while True:
                # Who sends the jobs may wait for results before there are more.
                num_left = 0 if reader.is_behind() else _WRITES_PENDING - 1
                _report_written(pending, report, num_left)
                item = reader.next()
                if item is None:
                    break
                if item.image is None:
                    _report_failure(item, item.error, report)
                    continue
                # Outside of what may fail: without a model there is no point in the next file.
                pipe = pipe or load()
                started = time.perf_counter()
                progress = progress_of(item.job) if progress_of else None
                try:
                    result = restore(pipe, item.image, item.job, request, progress)
                except FAILURES as error:
                    item.seconds += time.perf_counter() - started
                    _report_failure(item, error, report)
                    continue
                item.seconds += time.perf_counter() - started
                width, height = request.output_size(item.image) if result is None else result.size
                item.about["size"] = (width, height)
                item.image = None
                pending.append((item, writer.submit(_write, result, item, request)))
                if width * height > _ALONE_PIXELS:
                    _report_written(pending, report, 0)
        finally:
            _report_written(pending, report, 0)


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
    """A thread that reads images, one ahead."""

    def __init__(self, jobs: Iterable[Job], request: FileRequest) -> None:
        self._jobs, self._request = jobs, request
        self._items: queue.Queue[_Item | None] = queue.Queue(_READ_AHEAD)
        self._is_stopped = threading.Event()
        # A daemon: the source of jobs may wait for ever when the run is broken off.
        threading.Thread(target=self._run, name="tadsr-read", daemon=True).start()

    def is_behind(self) -> bool:
        """Return whether `next` would have to wait."""
        return self._items.empty()

    def next(self) -> _Item | None:
        """Return the next image, or None after the last."""
        return self._items.get()

    def __exit__(self, *error: object) -> None:
        self._is_stopped.set()

    def _run(self) -> None:
        try:
            for job in self._jobs:
                if self._is_stopped.is_set():
                    break
                self._put(_read(job, self._request))
        finally:
            self._put(None)

    def _put(self, item: _Item | None) -> None:
        is_put = False
        while not is_put and not self._is_stopped.is_set():
            with suppress(queue.Full):
                self._items.put(item, timeout=_POLL_SECONDS)
                is_put = True


def _read(job: Job, request: FileRequest) -> _Item:
    item = _Item(job)
    with _timed(item):
        try:
            item.image = read_input(job, request)
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
