"""One thread at a time."""

from __future__ import annotations

import os
import sys
import threading
import weakref

_locks: weakref.WeakSet[NetworkLock] = weakref.WeakSet()


class NetworkLock:
    """Lets one thread at a time use a pipeline's networks; a copy of the pipeline has its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _locks.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[NetworkLock], tuple[()]]:
        return NetworkLock, ()


def _renew_locks() -> None:
    """Free a forked process of what its parent's other threads held, and of waiting for these."""
    for lock in list(_locks):
        if lock._lock.acquire(blocking=False):  # free, or the forking thread's own
            lock._lock.release()
        else:
            lock._lock = threading.RLock()
    if _locks and "torch" in sys.modules:
        # The threads that torch computes with are not forked, but would be waited for.
        sys.modules["torch"].set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)
