"""Packages whose public names are imported on first use."""

from __future__ import annotations

import atexit
import gc
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


def lazy_names(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a package's `__getattr__`, so that importing it imports nothing heavy.

    Args:
        modules: The names that each module has, with spaces between them.
    """
    origins = {name: module for module, names in modules.items() for name in names.split()}

    def find(name: str) -> Any:
        if name not in origins:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(origins[name]), name)

    return find


@contextmanager
def lasting_imports() -> Iterator[None]:
    """Never search for garbage among what is imported; for commands, which need it to their end."""
    was_enabled, num_modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
        if len(sys.modules) > num_modules:
            gc.freeze()
            atexit.register(gc.unfreeze)  # or triton's binding prints what it takes for leaks
    finally:
        if was_enabled:
            gc.enable()
