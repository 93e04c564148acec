"""Keep the log lines of diffusers and transformers from users who called tadsr, not them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_is_quiet = ContextVar("tadsr_is_quiet", default=False)


class _ErrorsOnly(logging.Filter):
    """Drops records below ERROR in a thread that is inside `quiet_libraries`."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or not _is_quiet.get()


_FILTER = _ErrorsOnly()


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Drop what diffusers and transformers log below ERROR, in this thread."""
    for library in ("diffusers", "transformers"):
        # Loggers pass their records to these handlers without asking their parents' filters.
        for handler in logging.getLogger(library).handlers:
            handler.addFilter(_FILTER)
    token = _is_quiet.set(True)
    try:
        yield
    finally:
        _is_quiet.reset(token)
