"""Stop requests: Ctrl-C and SIGTERM end a run after the step that it is in."""

from __future__ import annotations

import signal
import threading
import time
from types import TracebackType
from typing import Any

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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
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
