"""Recipes: a configuration as a YAML file, checked value by value."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from tadsr.degradation import DegradationConfig, find_preset
from tadsr.field_checks import options_of
from tadsr.named_files import read_yaml
from tadsr.plain_yaml import parse_yaml
from tadsr.training.training_config import DataConfig, TrainingConfig

Config = TypeVar("Config")

_SHORT_FOR = {"data": "source", "degradation": "preset"}
"""Fields that a text stands for where a mapping could be."""


def load_recipe(path: str | Path, overrides: dict[str, Any] | None = None) -> TrainingConfig:
    """Read a training run from YAML, with some values replaced.

    A recipe may start from another one beside it (`extends: other.yaml`), and may name a file of
    networks beside it as `model`.

    Args:
        path: YAML file whose mapping mirrors `TrainingConfig`.
        overrides: Values by dotted name, such as {"stage.tavsd_weight": 0}; they win over the
            file.

    Returns:
        The checked configuration.

    Raises:
        ValueError: The file is no mapping, a name is not a field, or a value does not fit.
    """
    mapping = _read_recipe(Path(path))
    try:
        return config_from_mapping(TrainingConfig, override(mapping, overrides or {}))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_recipe(path: Path, extending: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in extending:
        raise ValueError(f"{path} must not extend itself, not through other recipes either")
    mapping = read_yaml(path)
    if not isinstance(mapping, dict):
        raise ValueError(f"{path} must hold a mapping of names to values, got {mapping!r}")
    beside = path.parent / str(mapping.get("model"))
    if beside.suffix in (".yaml", ".yml") and beside.is_file():
        mapping["model"] = str(beside)
    base = mapping.pop("extends", None)
    if base is None:
        return mapping
    if not isinstance(base, str):
        raise ValueError(f"{path}: extends must name one recipe, got {base!r}")
    return _merge(_read_recipe(path.parent / base, (*extending, path.resolve())), mapping)


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a mapping with another laid over it, mapping by mapping."""
    merged = dict(base)
    for name, value in changes.items():
        inner = merged.get(name)
        if name in _SHORT_FOR and isinstance(inner, str):
            inner = {_SHORT_FOR[name]: inner}
        if name == "data" and isinstance(value, str):  # a preset's name stands for all ranges
            value = {"source": value}
        is_deeper = isinstance(inner, dict) and isinstance(value, dict)
        merged[name] = _merge(inner, value) if is_deeper else value
    return merged


def _merge_into_preset(value: dict[str, Any]) -> dict[str, Any]:
    """Lay a degradation's mapping over the preset that it starts from, stage by stage."""
    changes = {k: v for k, v in value.items() if k != "preset"}
    base = dataclasses.asdict(find_preset(value.get("preset", DataConfig.degradation)))
    stages = changes.get("stages", [])
    if isinstance(stages, list) and len(stages) == len(base["stages"]):
        changes["stages"] = [
            _merge(ours, theirs) if isinstance(theirs, dict) else theirs
            for ours, theirs in zip(base["stages"], stages, strict=True)
        ]
    return _merge(base, changes)


def override(mapping: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return a mapping with values replaced by dotted name; the original stays as it is."""
    for dotted, value in overrides.items():
        for name in reversed(dotted.split(".")):
            value = {name: value}
        mapping = _merge(mapping, value)
    return mapping


def parse_value(name: str, text: str) -> Any:
    """Parse a field's value as it would stand in a recipe."""
    try:
        return parse_yaml(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{name} must be given a value in YAML, got {text!r}") from error


def flatten(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by dotted name, what is no plain value as text."""
    flat: dict[str, Any] = {}
    for name, value in mapping.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            is_plain = isinstance(value, bool | int | float | str)
            flat[f"{prefix}{name}"] = value if is_plain else str(value)
    return flat


def config_from_mapping(
    config_type: type[Config], mapping: dict[str, Any], place: str = ""
) -> Config:
    """Build a nested dataclass from plain data; `place` is what errors call it."""
    hints = typing.get_type_hints(config_type)
    fields = {field.name: field for field in dataclasses.fields(config_type)}
    unknown = sorted(map(str, mapping.keys() - fields.keys()))
    if unknown:
        meant = [m for u in unknown for m in difflib.get_close_matches(u, fields, n=1)]
        hint = f"Did you mean {' and '.join(meant)}?" if meant else f"It has {', '.join(fields)}"
        raise ValueError(f"{place or 'a run'} has the unknown {', '.join(unknown)}. {hint}")
    missing = [
        name
        for name, field in fields.items()
        if name not in mapping and field.default is field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{place or 'a run'} needs {', '.join(missing)}, but it is not given")
    values = {
        name: _convert(value, hints[name], f"{place}.{name}" if place else name)
        for name, value in mapping.items()
    }
    try:
        return config_type(**values)
    except ValueError as error:
        raise ValueError(f"{place}.{error}" if place else str(error)) from error


def _convert(value: Any, hint: Any, name: str) -> Any:
    """Build the configurations that mappings stand for; the rest is the fields' own concern."""
    classes = [option for option in options_of(hint) if dataclasses.is_dataclass(option)]
    if classes and isinstance(value, dict):
        return _convert_mapping(value, classes, name)
    if typing.get_origin(hint) is tuple and isinstance(value, list | tuple):
        return tuple(_convert(item, typing.get_args(hint)[0], name) for item in value)
    return value


def _convert_mapping(value: dict[str, Any], classes: list[type], name: str) -> Any:
    config_type = classes[0]
    if len(classes) > 1:
        # The first is the field's default, as in a recipe that names no kind.
        kinds = [option.kind for option in classes]
        kind = value.get("kind", kinds[0])
        if kind not in kinds:
            raise ValueError(f"{name}.kind must be one of {', '.join(kinds)}, got {kind!r}")
        config_type = classes[kinds.index(kind)]
    if config_type is DegradationConfig and ("preset" in value or "stages" not in value):
        value = _merge_into_preset(value)
    return config_from_mapping(config_type, value, name)
