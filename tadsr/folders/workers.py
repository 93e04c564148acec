"""A run over many images on several devices: one process for each, restarted when it dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

from tadsr.errors import ImageReadWarning, TADSRError
from tadsr.folders.jobs import Job
from tadsr.folders.outcome import Outcome
from tadsr.folders.restoring import FileRequest
from tadsr.folders.run import Pace, Report, run_files
from tadsr.whole_file import remove_abandoned

if TYPE_CHECKING:
    from tadsr.restorer import Restorer

_JOBS_AHEAD = 3
"""One computed, one read, one to come."""
_JOBS_AHEAD_IN_BATCHES = 32
"""Of a GPU: as many small images as go through it together, and as many to come."""
_TRIES = 2
_STARTS_IN_VAIN = 3
_END_SECONDS = 20
_LOADED = "loaded"
_TERMINATED = 128 + signal.SIGTERM

Load = Callable[[str], "Restorer"]
"""Gives the pipeline on a device; can be pickled."""


def run_on_devices(
    jobs: Sequence[Job], request: FileRequest, load: Load, devices: Sequence[str], report: Report
) -> Pace:
    """Upscale files on several devices at once.

    A worker that dies, as of too little memory, is started again; the image it was at is tried
    once more and then counted as failed.
    """
    run = _Dispatch(deque(jobs), request, load, devices, report)
    run.finish()
    return run.pace


class _Worker:
    """A process with a pipeline, and the jobs it was given."""

    def __init__(self, device: str, arguments: tuple[object, ...]) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA allows no fork
        self.device = device
        self.given: deque[Job] = deque()
        self.connection, far_end = context.Pipe()
        self.process: BaseProcess = context.Process(
            target=_work, args=(far_end, device, *arguments), daemon=True
        )
        self.process.start()
        far_end.close()

    def stop(self) -> None:
        """End the process, which removes what it has half-written."""
        self.connection.close()
        if not self.given:
            self.process.join(_END_SECONDS)  # it sees the end of its jobs
        for _ in range(_END_SECONDS):
            # Again and again: where it is in the middle of a finaliser, one is swallowed.
            self.process.terminate()
            self.process.join(1)
            if not self.process.is_alive():
                break
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


class _Dispatch:
    def __init__(
        self,
        jobs: deque[Job],
        request: FileRequest,
        load: Load,
        devices: Sequence[str],
        report: Report,
    ) -> None:
        self.jobs, self.report = jobs, report
        self.begin = getattr(report, "begin", lambda job, *, is_deadly: None)
        num_threads = max(1, (os.cpu_count() or 1) // len(devices))
        self.arguments = (load, request, num_threads)
        self.devices = devices
        self.workers: list[_Worker] = []
        self.num_tries: Counter[Path] = Counter()
        self.num_starts_in_vain = 0
        self.pace = Pace()

    def finish(self) -> None:
        try:
            self.workers = [
                _Worker(device, self.arguments) for device in self.devices[: len(self.jobs)]
            ]
            while self.jobs or any(worker.given for worker in self.workers):
                for worker in self.workers:
                    self._feed(worker)
                ready = wait([worker.connection for worker in self.workers])
                for worker in [w for w in self.workers if w.connection in ready]:
                    self._hear(worker)
        finally:
            for worker in self.workers:
                worker.stop()

    def _feed(self, worker: _Worker) -> None:
        # All at once only while there is enough for everybody.
        most = _JOBS_AHEAD_IN_BATCHES if str(worker.device).startswith("cuda") else _JOBS_AHEAD
        ahead = min(most, max(1, len(self.jobs) // len(self.workers)))
        while self.jobs and len(worker.given) < ahead:
            job = self.jobs.popleft()
            worker.given.append(job)
            self.begin(job, is_deadly=False)
            try:
                worker.connection.send(job)
            except OSError:
                return  # it died, which is heard of next

    def _hear(self, worker: _Worker) -> None:
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            self._replace(worker)
            return
        if isinstance(message, BaseException):
            raise message
        if message == _LOADED:
            # What it dies of from now on is an image, and counted as that image's.
            self.num_starts_in_vain = 0
            return
        outcome, pace = message
        self.pace.add(pace)
        worker.given.remove(outcome.job)
        self.report(outcome)

    def _replace(self, worker: _Worker) -> None:
        """Start a dead worker again and give its jobs back."""
        worker.stop()
        code = worker.process.exitcode
        self.num_starts_in_vain += 1
        if self.num_starts_in_vain > _STARTS_IN_VAIN * len(self.workers):
            raise TADSRError(
                f"a worker on {worker.device} must load the model, but {self.num_starts_in_vain} "
                f"of them ended first (the last with exit code {code}); try one --device"
            )
        if worker.given:
            # They are done in order, so that the first is the one it died of.
            job = worker.given[0]
            self.num_tries[job.source] += 1
            if self.num_tries[job.source] == _TRIES:
                worker.given.popleft()
                self.report(Outcome(job, "failed", message=_death_of(job, code)))
        for folder in {job.target.parent for job in worker.given}:
            remove_abandoned(folder)
        # It may have written a result that it could not report any more, and which image of a
        # batch it died of, nobody knows.
        again = [replace(job, may_replace=True, alone=True) for job in worker.given]
        self.jobs.extendleft(reversed(again))
        self.workers[self.workers.index(worker)] = _Worker(worker.device, self.arguments)


def _death_of(job: Job, code: int | None) -> str:
    return (
        f"{job.source}: its worker ended {_TRIES} times (exit code {code}), perhaps for lack of "
        "memory; try --max-memory"
    )


def _work(
    connection: Connection, device: str, load: Load, request: FileRequest, num_threads: int
) -> None:
    """Upscale the jobs that come through a connection until it closes."""
    # The run decides what an interrupt means; ended by it, files in the making are removed.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))
    # An outcome's note says the same.
    warnings.simplefilter("ignore", ImageReadWarning)
    import torch

    if device == "cpu":
        torch.set_num_threads(num_threads)
    elif str(device).startswith("cuda"):
        torch.cuda.set_device(device)

    def load_and_say_so() -> Restorer:
        pipe = load(device)
        connection.send(_LOADED)
        return pipe

    pace = Pace()

    def report(outcome: Outcome) -> None:
        connection.send((outcome, pace.take()))

    try:
        run_files(_received(connection), request, load_and_say_so, report, pace=pace)
    except BrokenPipeError:
        pass  # the run is gone
    except Exception as error:
        connection.send(error)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # what follows is the interpreter's own end


def _received(connection: Connection) -> Iterator[Job]:
    try:
        while True:
            yield connection.recv()
    except (EOFError, OSError):
        return
