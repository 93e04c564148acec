"""Recipes: a stage's configuration as a YAML file."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

Config = TypeVar("Config")


def load_recipe(path: str | Path, config_type: type[Config], overrides: dict[str, Any]) -> Config:
    """Read a configuration from YAML, with some values replaced.

    Args:
        path: YAML file whose mapping mirrors the dataclass.
        config_type: Frozen dataclass to build, such as `StudentConfig`.
        overrides: Values by dotted name, such as {"run.output": "runs/mine"}; None keeps the
            file's value.

    Returns:
        The checked configuration.

    Raises:
        ValueError: A name is not a field, or a value is out of range.
    """
    mapping = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    for dotted, value in overrides.items():
        if value is not None:
            *parents, name = dotted.split(".")
            target = mapping
            for parent in parents:
                target = target.setdefault(parent, {})
            target[name] = value
    return config_from_mapping(config_type, mapping)


def config_from_mapping(config_type: type[Config], mapping: dict[str, Any]) -> Config:
    """Build a nested dataclass from plain data; unknown names raise ValueError."""
    types = typing.get_type_hints(config_type)
    known = [f.name for f in dataclasses.fields(config_type)]
    unknown = sorted(set(mapping) - set(known))
    if unknown:
        raise ValueError(
            f"{config_type.__name__} has the fields {known}, got the unknown {unknown}; "
            "correct the recipe"
        )
    values = {}
    for name, value in mapping.items():
        if dataclasses.is_dataclass(types[name]):
            value = config_from_mapping(types[name], value)
        elif isinstance(value, list):
            value = tuple(value)
        values[name] = value
    return config_type(**values)
