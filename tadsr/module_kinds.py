"""Kinds of modules by the names of their classes, so that their libraries need not be imported."""

from __future__ import annotations


def is_kind(module: object, *names: str) -> bool:
    """Tell whether a module's class, or one that it derives from, has one of these names.

    Args:
        module: Any object.
        *names: Such as "Attention" of diffusers or "BaseTunerLayer" of PEFT.
    """
    return any(base.__name__ in names for base in type(module).__mro__)
