"""Tell after a run's death whether it can have been for lack of memory."""

from __future__ import annotations

from pathlib import Path

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_COUNTERS = Path("/proc/vmstat")


def count_kills() -> str | None:
    """Return a marker of this boot and how often memory ran out in it; None if unknown."""
    try:
        boot = _BOOT.read_text(encoding="ascii").strip()
        lines = dict(line.split() for line in _COUNTERS.read_text(encoding="ascii").splitlines())
        return f"{boot} {lines['oom_kill']}"
    except (OSError, ValueError, KeyError):  # not Linux
        return None


def has_rebooted(mark: object) -> bool:
    """Return whether a marker is from another machine or an earlier boot."""
    now = count_kills()
    return now is not None and isinstance(mark, str) and mark.split()[:1] != now.split()[:1]


def has_run_out(mark: object) -> bool:
    """Return whether memory ran out on this machine since a marker."""
    now = count_kills()
    if now is None or not isinstance(mark, str) or has_rebooted(mark):
        return False
    return mark.rpartition(" ")[2] != now.rpartition(" ")[2]
