"""One thread at a time."""

from __future__ import annotations

import threading


class NetworkLock:
    """Lets one thread at a time use a pipeline's networks; a copy of the pipeline has its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[NetworkLock], tuple[()]]:
        return NetworkLock, ()
