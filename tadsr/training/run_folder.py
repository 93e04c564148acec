"""The folder of a run: whose it is, and that one process at a time works in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tadsr.checkpoints.json_files import read_json
from tadsr.errors import TrainingError
from tadsr.training.recipe import config_from_mapping, config_to_mapping
from tadsr.training.training_config import TrainingConfig
from tadsr.whole_file import whole_file

_FREE_TO_CHANGE = ("output", "steps", "device", "log_every", "save_every", "keep_checkpoints",
                   "trackers", "validation", "export_precision", "max_loss_ratio")  # fmt: skip
"""Fields that a continued run may have other values of; they change no step."""
_FREE_DATA_FIELDS = ("num_workers", "cache_photos")


def claim_folder(folder: Path, config: TrainingConfig) -> None:
    """Make an output folder this run's, or check that it is."""
    path = folder / "config.json"
    ours = json.loads(json.dumps(config_to_mapping(config)))
    if path.is_file():
        theirs = _with_defaults(read_json(path))
        differing = sorted(_differences(_fixed(ours), _fixed(theirs)))
        if differing:
            raise TrainingError(
                f"{folder} must be a new folder or this run's, but it holds a run that differs in "
                f"{', '.join(differing)}; choose another output, or delete it to start anew"
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise TrainingError(
            f"{folder} must be a new folder or a run's, but it holds other files; choose another "
            "output"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder), whole_file(path) as partial:
            partial.write_text(json.dumps(ours, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise TrainingError(f"{folder} must be a folder that can be written: {error}") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from training in a folder."""
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise TrainingError(
            f"{folder} must be used by one run at a time, but another process trains in it; wait "
            "for it, or choose another output"
        ) from error


def _with_defaults(mapping: dict[str, Any]) -> dict[str, Any]:
    """Fill in fields that an older version did not know with their defaults, which do the same."""
    with suppress(ValueError):  # fields that are gone differ
        return json.loads(
            json.dumps(config_to_mapping(config_from_mapping(TrainingConfig, mapping)))
        )
    return mapping


def _fixed(mapping: dict[str, Any]) -> dict[str, Any]:
    fixed = {k: v for k, v in mapping.items() if k not in _FREE_TO_CHANGE}
    if isinstance(data := mapping.get("data"), dict):
        fixed["data"] = {k: v for k, v in data.items() if k not in _FREE_DATA_FIELDS}
    return fixed


def _differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    found = []
    for key in a.keys() | b.keys():
        left, right = a.get(key), b.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            found += [f"{key}.{inner}" for inner in _differences(left, right)]
        elif left != right:
            found.append(key)
    return found
