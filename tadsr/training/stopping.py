"""How a run ends early: stop requests, and failures as sentences that say how to go on."""

from __future__ import annotations

import errno
import shutil
import signal
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from tadsr.errors import DataError, TrainingError
from tadsr.onestep.tasks import is_out_of_memory

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ECHO_SECONDS = 1
"""A supervisor and its group may send one signal each; the second one means no more haste."""


class StopRequest:
    """While entered, the first Ctrl-C or SIGTERM asks to stop; a later one stops at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._asked_at = 0.0
        self._previous: dict[int, Any] = {}

    @property
    def is_asked(self) -> bool:
        """Whether a signal has come."""
        return self.signal is not None

    def __enter__(self) -> StopRequest:
        """Take over the signals where that is possible: in the main thread."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._on_signal) for s in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _on_signal(self, number: int, _: object) -> None:
        if self.signal is None:
            self.signal, self._asked_at = number, time.monotonic()
        elif time.monotonic() - self._asked_at > _ECHO_SECONDS:
            raise KeyboardInterrupt


def leave_signals_to_the_parent() -> None:
    """Ignore stop requests in a worker process: whoever it works for ends it in good order."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def explain_failure(error: Exception, step: int, folder: Path, latest: Path | None) -> Exception:
    """Return what ended a run as one sentence; errors that are not known stay as they are.

    Args:
        step: Steps done.
        folder: The run's.
        latest: Its newest whole checkpoint, if there is one.
    """
    # A loader tells of workers that have died wherever the run is at that moment.
    explained = explain_worker_failure(error)
    if explained is not error:
        return explained
    if is_out_of_memory(error):
        return TrainingError(
            f"step {step + 1} does not fit the memory: {error}. Start a new run with, "
            "the cheapest first: gradient_checkpointing, precision bf16, batch_size 1 with "
            "more gradient_accumulation_steps, a smaller data.crop_px; or free memory, and "
            "the same run goes on from its last checkpoint"
        )
    if getattr(error, "errno", None) in _FULL:
        return full_disk(f"{folder} cannot be written after step {step}", folder, error, latest)
    return error


def full_disk(what: str, folder: Path, error: Exception, latest: Path | None) -> TrainingError:
    """Return the error for a file that cannot be written."""
    kept = f"the last whole checkpoint is {latest}" if latest else "there is no checkpoint yet"
    free = shutil.disk_usage(folder).free
    return TrainingError(
        f"{what}: {str(error).splitlines()[0]} ({free / 1e6:.1f} MB are free); {kept}. Make room "
        "and start the same run again"
    )


def explain_worker_failure(error: Exception) -> Exception:
    """Return what went wrong in a worker process as one sentence; other errors as they are."""
    text = str(error) or type(error).__name__
    if isinstance(error, DataError) and "DataLoader worker" in text:
        return DataError(text.rpartition("DataError: ")[2].strip())
    is_told = "DataLoader worker" in text and (
        "exited unexpectedly" in text or "killed by signal" in text
    )
    # The socket that a sample was to come through is closed or gone.
    is_cut_off = isinstance(error, OSError | EOFError) and any(
        frame.f_globals.get("__name__", "").startswith("multiprocessing.")
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )
    if not is_told and not is_cut_off:
        return error
    return DataError(
        f"a process that prepares samples has died ({text.splitlines()[0]}), most likely because "
        "memory ran out; lower data.num_workers, or switch data.cache_photos off, and start the "
        "same run again: it goes on from its last checkpoint"
    )
