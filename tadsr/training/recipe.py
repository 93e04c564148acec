"""Recipes: a configuration as a YAML file, checked value by value."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from tadsr.degradation import DegradationConfig, find_preset
from tadsr.training.stages.stage_config import TimestepRamp
from tadsr.training.training_config import TrainingConfig

Config = TypeVar("Config")


def load_recipe(path: str | Path, overrides: dict[str, Any] | None = None) -> TrainingConfig:
    """Read a training run from YAML, with some values replaced.

    A recipe may start from another one beside it (`extends: other.yaml`), and may name a file of
    networks beside it as `model`.

    Args:
        path: YAML file whose mapping mirrors `TrainingConfig`.
        overrides: Values by dotted name, such as {"stage.tavsd_weight": 0}; they win over the
            file. Values that are text are read as YAML.

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


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        mapping = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path} must be a readable YAML file: {error}") from error
    if not isinstance(mapping, dict):
        raise ValueError(f"{path} must hold a mapping of names to values, got {mapping!r}")
    beside = path.parent / str(mapping.get("model"))
    if beside.suffix in (".yaml", ".yml") and beside.is_file():
        mapping["model"] = str(beside)
    base = mapping.pop("extends", None)
    return mapping if base is None else _merge(_read_recipe(path.parent / base), mapping)


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a mapping with another laid over it, mapping by mapping."""
    merged = dict(base)
    for name, value in changes.items():
        inner = merged.get(name)
        is_deeper = isinstance(inner, dict) and isinstance(value, dict)
        merged[name] = _merge(inner, value) if is_deeper else value
    return merged


def _merge_into_preset(value: dict[str, Any]) -> dict[str, Any]:
    """Lay a degradation's mapping over the preset that it starts from, stage by stage."""
    changes = {k: v for k, v in value.items() if k != "preset"}
    base = dataclasses.asdict(find_preset(value["preset"]))
    stages = changes.get("stages", [])
    if isinstance(stages, list) and len(stages) == len(base["stages"]):
        changes["stages"] = [
            _merge(ours, theirs) if isinstance(theirs, dict) else theirs
            for ours, theirs in zip(base["stages"], stages, strict=True)
        ]
    return _merge(base, changes)


def override(mapping: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return a mapping with values replaced by dotted name; the original stays as it is."""
    result = {k: dict(v) if isinstance(v, dict) else v for k, v in mapping.items()}
    for dotted, value in overrides.items():
        first, _, rest = dotted.partition(".")
        if not rest:
            result[first] = yaml.safe_load(value) if isinstance(value, str) else value
            continue
        inner = result.get(first, {})
        if first == "data" and isinstance(inner, str):
            inner = {"source": inner}
        if not isinstance(inner, dict):
            raise ValueError(f"{dotted} must lie in a mapping, but {first} is {inner!r}")
        result[first] = override(inner, {rest: value})
    return result


def config_to_mapping(config: Any) -> dict[str, Any]:
    """Turn a configuration into plain data, for `config_from_mapping`."""
    return dataclasses.asdict(config)


def config_from_mapping(config_type: type[Config], mapping: dict[str, Any]) -> Config:
    """Build a nested dataclass from plain data."""
    hints = typing.get_type_hints(config_type)
    fields = dataclasses.fields(config_type)
    known = [f.name for f in fields]
    unknown = sorted(set(mapping) - set(known))
    if unknown:
        meant = [m for u in unknown for m in difflib.get_close_matches(str(u), known, n=1)]
        hint = f". Did you mean {' and '.join(meant)}?" if meant else ""
        raise ValueError(
            f"{config_type.__name__} has the fields {', '.join(known)}; got the unknown "
            f"{', '.join(map(str, unknown))}{hint}"
        )
    optional = (dataclasses.MISSING, dataclasses.MISSING)
    missing = [
        f.name
        for f in fields
        if f.name not in mapping and (f.default, f.default_factory) == optional
    ]
    if missing:
        raise ValueError(f"{config_type.__name__} needs {', '.join(missing)}, but it is not given")
    values = {
        name: _convert(value, hints[name], f"{config_type.__name__}.{name}")
        for name, value in mapping.items()
    }
    return config_type(**values)


def _convert(value: Any, hint: Any, name: str) -> Any:
    """Convert a value to its field's type, or raise ValueError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(value, arguments, name)
    if dataclasses.is_dataclass(hint):
        return _convert_dataclass(value, hint, name)
    if origin is Literal:
        if value in arguments:
            return value
        raise ValueError(f"{name} must be one of {', '.join(map(repr, arguments))}, got {value!r}")
    if origin is tuple and isinstance(value, list | tuple):
        inner = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        if len(inner) == len(value):
            return tuple(_convert(v, h, name) for v, h in zip(value, inner, strict=True))
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and is_number:
        return float(value)
    if hint is float and isinstance(value, str):  # YAML reads 5e-5, without a point, as text
        try:
            return float(value)
        except ValueError:
            pass
    if hint in (int, bool, str) and type(value) is hint:
        return value
    expected = getattr(hint, "__name__", str(hint)) if origin is None else str(hint)
    raise ValueError(f"{name} must be {expected}, got {value!r}")


def _convert_union(value: Any, options: tuple[Any, ...], name: str) -> Any:
    if value is None and type(None) in options:
        return None
    plain = [o for o in options if o is not type(None)]
    if isinstance(value, dict) or dataclasses.is_dataclass(value):
        classes = [o for o in plain if dataclasses.is_dataclass(o)]
        by_kind = {getattr(o, "kind", None): o for o in classes}
        if len(classes) > 1 and isinstance(value, dict):
            # The first is the field's default, as in a recipe that names no kind.
            kind = value.get("kind", classes[0].kind)
            if kind not in by_kind:
                raise ValueError(f"{name}.kind must be one of {', '.join(by_kind)}, got {kind!r}")
            return _convert_dataclass(value, by_kind[kind], name)
        plain = classes
    else:
        plain = [o for o in plain if not dataclasses.is_dataclass(o)] or plain
    return _convert(value, plain[0], name)


def _convert_dataclass(value: Any, hint: type, name: str) -> Any:
    if isinstance(value, hint):
        return value
    if hint is TimestepRamp and isinstance(value, int | float) and not isinstance(value, bool):
        return TimestepRamp(float(value), float(value))
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a mapping, got {value!r}")
    if hint is DegradationConfig and "preset" in value:
        value = _merge_into_preset(value)
    return config_from_mapping(hint, value)
