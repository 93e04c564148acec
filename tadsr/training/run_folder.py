"""The folder of a run: whose it is, who works in it, and its checkpoints."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tadsr.checkpoints.json_files import read_json
from tadsr.errors import CheckpointError, TrainingError
from tadsr.named_files import check_is_file, parse_json, read_text
from tadsr.training.recipe import config_from_mapping, flatten
from tadsr.training.stopping import full_disk
from tadsr.training.training_config import TrainingConfig
from tadsr.whole_file import whole_file

_FREE_TO_CHANGE = ("output", "steps", "device", "log_every", "save_every", "keep_checkpoints",
                   "trackers", "validation", "export_precision", "max_loss_ratio",
                   "data.num_workers", "data.cache_photos")  # fmt: skip
"""Fields that a continued run may have other values of; they change no step."""


def claim_folder(folder: Path, config: TrainingConfig) -> None:
    """Make an output folder this run's, or check that it is."""
    path = folder / "config.json"
    ours = json.loads(json.dumps(asdict(config)))
    if path.is_file():
        fixed, theirs = _fixed(ours), _fixed(_with_defaults(read_json(path)))
        names = sorted(fixed.keys() | theirs.keys())
        differing = [name for name in names if fixed.get(name) != theirs.get(name)]
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
        return json.loads(json.dumps(asdict(config_from_mapping(TrainingConfig, mapping))))
    return mapping


def _fixed(mapping: dict[str, Any]) -> dict[str, Any]:
    """Return by dotted name what a continued run must leave as it is."""
    free = set(_FREE_TO_CHANGE)
    return {n: v for n, v in flatten(mapping).items() if not free & {n, n.partition(".")[0]}}


_DAMAGED = (pickle.UnpicklingError, SafetensorError)
_STEP_NAME = re.compile(r"step_(\d{8})")


class RunState:
    """Write and read a run's checkpoints.

    Accelerate stores optimizers, gradient scaler and every process's random states; of the
    networks only trained parameters and buffers are stored, since the rest is in the model that
    the run started from.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        networks: dict[str, nn.Module],
        average: dict[str, Tensor],
        keep: int,
    ) -> None:
        self.folder = folder
        self.accelerator = accelerator
        self.networks = networks
        self.keep = keep
        self.average = average
        accelerator.register_save_state_pre_hook(self._save_networks)
        accelerator.register_load_state_pre_hook(self._load_networks)

    def latest(self) -> Path | None:
        """Return the newest whole checkpoint, or None."""
        found = self._all()
        return found[-1] if found else None

    def save(self, step: int, progress: dict[str, Any], *, name: str | None = None) -> Path:
        """Write a checkpoint; it appears under its name only when it is whole."""
        try:
            return self._save(step, progress, name)
        # safetensors and torch raise their own types where a disk is full.
        except (OSError, RuntimeError, SafetensorError) as error:
            for partial in self.folder.glob(".*.partial"):
                shutil.rmtree(partial, ignore_errors=True)
            what = f"the checkpoint of step {step} cannot be written to {self.folder}"
            raise full_disk(what, self.folder, error, self.latest()) from error

    def _save(self, step: int, progress: dict[str, Any], name: str | None) -> Path:
        target = self.folder / (name or f"step_{step:08d}")
        partial = self.folder / f".{target.name}.partial"
        accelerator = self.accelerator
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial), safe_serialization=True)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if self.average:
                average = {n: t.detach().cpu().contiguous() for n, t in self.average.items()}
                save_file(average, partial / "average.safetensors")
            text = json.dumps({"step": step, **progress}, indent=2) + "\n"
            (partial / "progress.json").write_text(text, encoding="utf-8")
            _flush(partial)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(partial, target)
            if name is None:
                for old in self._all()[: -self.keep]:
                    shutil.rmtree(old, ignore_errors=True)
        accelerator.wait_for_everyone()
        return target

    def load(self, checkpoint: Path) -> dict[str, Any]:
        """Restore a checkpoint into networks and optimizers; return its progress."""
        try:
            self.accelerator.load_state(str(checkpoint))
            if self.average:
                check_is_file(checkpoint / "average.safetensors")
                stored = load_file(checkpoint / "average.safetensors")
                for name, tensor in self.average.items():
                    tensor.copy_(stored[name])
            return parse_json(read_text(checkpoint / "progress.json"))
        except (OSError, ValueError, KeyError, RuntimeError, EOFError, *_DAMAGED) as error:
            raise CheckpointError(
                f"{checkpoint} must be a checkpoint of this run, but cannot be restored: "
                f"{str(error).splitlines()[0] or error!r}; "
                "delete it to go on from the one before, or choose another output folder"
            ) from error

    def _all(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(p for p in self.folder.iterdir() if _STEP_NAME.fullmatch(p.name))

    def _save_networks(self, models: list[nn.Module], weights: list, output_dir: str) -> None:
        weights.clear()  # accelerate would write every frozen weight
        if self.accelerator.is_main_process:
            for name, network in self.networks.items():
                tensors = {
                    key: tensor.detach().cpu().contiguous().clone()
                    for key, tensor in _trained_tensors(network).items()
                }
                save_file(tensors, Path(output_dir) / f"{name}.safetensors")

    def _load_networks(self, models: list[nn.Module], input_dir: str) -> None:
        models.clear()
        for name, network in self.networks.items():
            stored = load_file(Path(input_dir) / f"{name}.safetensors")
            tensors = _trained_tensors(network)
            if stored.keys() != tensors.keys():
                differing = sorted(stored.keys() ^ tensors.keys())
                raise ValueError(f"the trained parameters of {name} differ: {differing[:5]}")
            with torch.no_grad():
                for key, tensor in tensors.items():
                    tensor.copy_(stored[key])


def _trained_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return trained parameters, and the buffers that belong to a module's state."""
    parameters = {n: p for n, p in network.named_parameters() if p.requires_grad}
    names = {n for n, _ in network.named_parameters()}
    buffers = {n: t for n, t in network.state_dict().items() if n not in names}
    return parameters | buffers


def _flush(folder: Path) -> None:
    """Flush every file to disk before the folder gets its final name."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
