"""Mappings that forget what was used longest ago."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any


class RecentlyUsed(OrderedDict):
    """A mapping of at most so many entries."""

    def __init__(self, limit: float = math.inf) -> None:
        super().__init__()
        self.limit = limit

    def __getitem__(self, key: Hashable) -> Any:
        self.move_to_end(key)
        return super().__getitem__(key)

    def __setitem__(self, key: Hashable, value: Any) -> None:
        super().__setitem__(key, value)
        self.move_to_end(key)
        if len(self) > self.limit:
            del self[next(iter(self))]
