"""What a configuration's values must be, as its fields' types say."""

from __future__ import annotations

import functools
import math
import os
import types
import typing
from dataclasses import dataclass, fields, is_dataclass
from numbers import Integral, Real
from typing import Annotated, Any, Literal, Union


@dataclass(frozen=True)
class Within:
    """What a number, or each number of a tuple, must lie in."""

    low: float
    high: float = math.inf
    is_open: bool = False
    """Whether `low` itself is out."""
    may_be_infinite: bool = False
    """Whether infinity switches a limit off."""
    is_ordered: bool = False
    """Whether a tuple's numbers rise or stay."""

    def holds(self, value: float | tuple[float, ...]) -> bool:
        """Tell whether a number, or all of several, lie inside."""
        numbers = value if isinstance(value, tuple) else (value,)
        is_inside = all(
            (self.low < n if self.is_open else self.low <= n) and n <= self.high for n in numbers
        )
        return is_inside and (not self.is_ordered or list(numbers) == sorted(numbers))

    def __str__(self) -> str:
        order = "ordered and " if self.is_ordered else ""
        if self.high == math.inf:
            return f"{order}{'above' if self.is_open else 'at least'} {self.low:g}"
        return f"{order}in {'(' if self.is_open else '['}{self.low:g}, {self.high:g}]"


Count = Annotated[int, Within(1)]
"""At least 1."""
Natural = Annotated[int, Within(0)]
"""At least 0."""
Weight = Annotated[float, Within(0)]
"""At least 0, finite."""
Positive = Annotated[float, Within(0, is_open=True)]
"""Above 0, finite."""
Limit = Annotated[float, Within(0, is_open=True, may_be_infinite=True)]
"""Above 0; infinity switches it off."""
Probability = Annotated[float, Within(0, 1)]
"""In [0, 1]."""
Place = Annotated[str, "place"]
"""A path, or a name on the hub; "~" and $NAME mean what they mean in a shell, though not
in an address."""


def check_fields(config: Any) -> None:
    """Bring a dataclass' values into its fields' types: numbers, lists as tuples, whole paths.

    Raises:
        ValueError: A value is of another type, a number is out of its range or not finite, or a
            path is empty.
    """
    hints = _hints_of(type(config))
    for field in fields(config):
        value = _convert(getattr(config, field.name), hints[field.name], field.name)
        object.__setattr__(config, field.name, value)


@functools.cache
def _hints_of(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def options_of(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the only one."""
    is_union = typing.get_origin(hint) in (Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _convert(value: Any, hint: Any, name: str) -> Any:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    for option in options_of(hint):
        is_marked = typing.get_origin(option) is Annotated
        kind, mark = typing.get_args(option) if is_marked else (option, None)
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin is tuple and isinstance(value, list | tuple):
            inner = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
            if len(inner) != len(value):
                raise ValueError(f"{name} must have {len(inner)} values, got {value}")
            found = tuple(_convert(v, h, name) for v, h in zip(value, inner, strict=True))
        elif origin is Literal:
            if value not in arguments:
                continue
            found = value
        elif option is Place:
            if not isinstance(value, str | os.PathLike):
                continue
            found = _expand(os.fspath(value), name)
        elif kind is float and is_number:
            found = float(value)
            is_limit = isinstance(mark, Within) and mark.may_be_infinite and found == math.inf
            if not (is_limit or math.isfinite(found)):
                raise ValueError(f"{name} must be a finite number, got {value}")
        elif kind is int and is_number and (isinstance(value, Integral) or value == value // 1):
            found = int(value)
        elif is_number and hasattr(kind, "constant"):
            found = kind.constant(_convert(value, Weight, name))
        elif kind not in (int, float) and isinstance(value, origin or kind):
            found = value
        else:
            continue
        if isinstance(mark, Within) and not mark.holds(found):
            raise ValueError(f"{name} must be {mark}, got {value}")
        return found
    raise ValueError(f"{name} must be {_describe(hint)}, got {value!r}")


def _expand(path: str, name: str) -> str:
    if not path.strip():
        raise ValueError(f"{name} must be a path or a name, got {path!r}")
    if "://" in path:  # another's recipe must not send what the variables hold
        return path
    return os.path.expanduser(os.path.expandvars(path))


def _describe(hint: Any) -> str:
    """Return what a type is called in errors."""
    options, arguments = options_of(hint), typing.get_args(hint)
    if len(options) > 1:
        return " or ".join(dict.fromkeys(map(_describe, options)))
    origin = typing.get_origin(hint)
    if origin is Annotated:
        return _describe(arguments[0])
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin is tuple:
        return f"a list [{', '.join('…' if a is ... else _describe(a) for a in arguments)}]"
    if is_dataclass(hint):
        number = "a number or " if hasattr(hint, "constant") else ""
        return f"{number}a {hint.__name__} (in a recipe a mapping)"
    return "null" if hint is types.NoneType else (origin or hint).__name__
