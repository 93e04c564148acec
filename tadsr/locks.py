"""Locks that a forked process does not wait for."""

from __future__ import annotations

import os
import sys
import threading
import weakref

_locks: weakref.WeakSet[Lock] = weakref.WeakSet()


class Lock(type(threading.RLock())):
    """A reentrant lock; a forked process and a copy of its owner have a free one."""

    def __init__(self) -> None:
        super().__init__()
        _locks.add(self)

    def __reduce__(self) -> tuple[type[Lock], tuple[()]]:
        return type(self), ()

    def after_fork(self) -> None:
        """Free a forked process of what its parent's other threads held."""
        if self.acquire(blocking=False):  # free, or the forking thread's own
            self.release()
        else:
            self._at_fork_reinit()
            self.was_held()

    def was_held(self) -> None:
        """Undo in a forked process what the holder of the lock had begun."""


class NetworkLock(Lock):
    """Lets one thread at a time use a pipeline's networks."""

    def after_fork(self) -> None:
        """Free a forked process also of the threads that torch computes with, which it lacks."""
        super().after_fork()
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)


def _renew_locks() -> None:
    for lock in list(_locks):
        lock.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)
