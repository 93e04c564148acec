"""What caches are made of: mappings that forget, and whether networks are still what they were."""

from __future__ import annotations

import math
import operator
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef


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


def is_kind(module: object, *names: str) -> bool:
    """Tell whether a module's class, or one that it derives from, has one of these names.

    Args:
        module: Any object.
        *names: Such as "Attention" of diffusers or "BaseTunerLayer" of PEFT.
    """
    return any(base.__name__ in names for base in type(module).__mro__)


class ModuleWatch:
    """Notices changes of modules and of their weights.

    Merging, loading, moving and casting are noticed, and so are attached adapters, hooks and
    attention processors. What torch does not count is not: values written through `.data`.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        modules = list({m: None for network in networks for m in network.modules()})
        states = [m.__dict__ for m in modules]
        # The dicts themselves, since every call of the pipeline goes through all of them.
        self._child_dicts = [state["_modules"] for state in states]
        self._weight_dicts = [state["_parameters"] for state in states if state["_parameters"]]
        kinds = ("_forward_hooks", "_forward_pre_hooks")
        self._hook_dicts = [state[kind] for state in states for kind in kinds]
        self._states = states
        self._attentions = [m for m in modules if is_kind(m, "Attention")]
        self._known = self._look()
        # Weak: a weight that was replaced must be freed. Yet the storage's own address cannot be
        # taken by another while these exist, as a data pointer can.
        self._storages = [
            StorageWeakRef(p.untyped_storage()) for p in self._known[1] if p is not None
        ]

    def is_current(self) -> bool:
        """Tell whether nothing has changed."""
        known, found = self._known, self._look()
        # Weights are compared as objects: == would compare their values.
        return found[0] == known[0] and all(
            len(now) == len(then) and all(map(operator.is_, now, then))
            for now, then in zip(found[1:], known[1:], strict=True)
        )

    def _look(self) -> tuple[list[object], ...]:
        weights = list(chain.from_iterable(map(dict.values, self._weight_dicts)))
        numbers = [
            *(None if p is None else _version(p) for p in weights),
            *(None if p is None else p.untyped_storage()._cdata for p in weights),
            *map(len, self._hook_dicts),
            # What offloading and some optimizers put in place of the method.
            *("forward" in state for state in self._states),
        ]
        children = list(chain.from_iterable(map(dict.values, self._child_dicts)))
        return numbers, weights, children, [m.processor for m in self._attentions]


def _version(parameter: Tensor) -> int:
    # Tensors made in inference mode count no versions.
    return -1 if parameter.is_inference() else parameter._version
