"""Progress as callers are told it: a few times a second, whatever the pieces are."""

from __future__ import annotations

import time
from collections.abc import Callable

Progress = Callable[[float], None]
"""Told the share of the work that is done, 0..1; may raise to cancel."""

INTERVAL_S = 0.25
"""Between two calls. A page or a socket may take longer over a call than a band takes."""


def paced(
    progress: Progress,
    clock: Callable[[], float] = time.monotonic,
    interval: float = INTERVAL_S,
) -> Progress:
    """Throttle a progress callback; the first share and the end always pass."""
    due = -float("inf")

    def tell(share: float) -> None:
        nonlocal due
        if share >= 1 or clock() >= due:
            progress(share)
            # From the end of the call: one that is slow must not be made again at once.
            due = clock() + interval

    return tell
