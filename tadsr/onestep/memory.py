"""How much memory there is, and what it looks like when there is none."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(device: torch.device) -> int:
    """Return the bytes that can still be taken on a device.

    On the CPU this is what the system has to give without swapping, or what a container's limit
    leaves.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch holds in reserve can be used again.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = psutil.virtual_memory().available
    limit = _cgroup_value("memory.max")
    if limit is not None:
        found = min(found, max(0, limit - (_cgroup_value("memory.current") or 0)))
    return found


def used_bytes(device: torch.device) -> int:
    """Return the bytes that this process holds on a device."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    message = str(error).lower()
    # Of torch on a CPU, of CUDA for pinned memory, and of its libraries.
    names = "out of memory", "alloc_failed"
    is_named = any(name in message for name in names)
    return isinstance(error, RuntimeError) and (
        is_named or ("alloc" in message and "memory" in message)
    )


def _cgroup_value(name: str) -> int | None:
    try:
        return int((_CGROUP / name).read_text())
    except (OSError, ValueError):  # no container, or "max"
        return None
