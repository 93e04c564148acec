"""Memory that was freed on a CPU: kept by the process for what comes next, or given back."""

from __future__ import annotations

import ctypes
import functools
import os
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Numbers of mallopt's parameters."""
_NEVER = -1


def keep_freed_memory() -> None:
    """Have glibc use freed memory again, in a process that computes image after image.

    Left to itself it gives large tensors' memory back to the system, which clears the same pages
    for the next ones. Nothing changes without glibc, and where its environment variables
    (`MALLOC_…`, `GLIBC_TUNABLES`) say how it shall be.
    """
    is_told = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    libc = None if is_told else _glibc()
    if libc is not None:
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, _NEVER)


def give_back_freed_memory() -> None:
    """Give the system what is kept, before memory is measured or runs out."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
