"""Ranges that a configuration's numbers must lie in, stated with the fields' types."""

from __future__ import annotations

import functools
import math
import os
import typing
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal


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

    def holds(self, numbers: tuple[float, ...]) -> bool:
        """Tell whether all numbers lie inside."""
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
"""A path, or a name on the hub; "~" and $NAME mean what they mean in a shell."""


def check_fields(config: Any) -> None:
    """Check a dataclass' numbers and choices against the types of its fields; expand its paths.

    Raises:
        ValueError: A number is out of its range or not finite, a value is none of a Literal's, or
            a path is empty.
    """
    hints = _hints_of(type(config))
    for field in fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if Place in (hint, *typing.get_args(hint)) and isinstance(value, str | os.PathLike):
            object.__setattr__(config, field.name, _expand(value, field.name))
        else:
            _check(value, hint, field.name)


def _expand(path: str | os.PathLike[str], name: str) -> str:
    if not os.fspath(path).strip():
        raise ValueError(f"{name} must be a path or a name, got {path!r}")
    return os.path.expanduser(os.path.expandvars(os.fspath(path)))


@functools.cache
def _hints_of(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def _check(value: Any, hint: Any, name: str) -> None:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if value is None or is_dataclass(value):
        return
    if origin is Annotated:
        inner, within = arguments
        numbers = value if isinstance(value, tuple) else (value,)
        if not (within.may_be_infinite and value == math.inf):
            _check(value, inner, name)
        if not within.holds(numbers):
            raise ValueError(f"{name} must be {within}, got {value}")
    elif origin is Literal:
        if value not in arguments:
            choices = ", ".join(map(repr, arguments))
            raise ValueError(f"{name} must be one of {choices}, got {value!r}")
    elif origin is tuple:
        if arguments[1] is not ... and len(value) != len(arguments):
            raise ValueError(f"{name} must have {len(arguments)} values, got {value}")
        for item in value:
            _check(item, arguments[0], name)
    elif origin is not None:  # a union
        for option in arguments:
            if typing.get_origin(option) in (Literal, Annotated):
                _check(value, option, name)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value}")
