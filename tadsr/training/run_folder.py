"""The folder of a run: whose it is, its log, and leaving it cleanly."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor

from tadsr.errors import TrainingError
from tadsr.training.recipe import config_from_mapping, config_to_mapping
from tadsr.training.training_config import TrainingConfig
from tadsr.whole_file import whole_file

_FREE_TO_CHANGE = ("output", "steps", "device", "log_every", "save_every", "keep_checkpoints",
                   "trackers", "validation", "export_precision")  # fmt: skip
"""Fields that a continued run may have other values of; they change no step."""
_FREE_DATA_FIELDS = ("num_workers", "cache_photos")


def claim_folder(folder: Path, config: TrainingConfig) -> None:
    """Make an output folder this run's, or check that it is.

    Args:
        folder: The output folder; created where it does not exist.
        config: The run.

    Raises:
        TrainingError: The folder holds another run, or something else.
    """
    path = folder / "config.json"
    ours = json.loads(json.dumps(config_to_mapping(config)))
    if path.is_file():
        theirs = _with_defaults(json.loads(path.read_text(encoding="utf-8")))
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
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_text(json.dumps(ours, indent=2) + "\n", encoding="utf-8")


def _with_defaults(mapping: dict[str, Any]) -> dict[str, Any]:
    """Complete what an older version wrote by today's defaults, which do what it did."""
    with suppress(ValueError):  # fields that are gone differ
        return json.loads(
            json.dumps(config_to_mapping(config_from_mapping(TrainingConfig, mapping)))
        )
    return mapping


def _fixed(mapping: dict[str, Any]) -> dict[str, Any]:
    fixed = {k: v for k, v in mapping.items() if k not in _FREE_TO_CHANGE}
    fixed["data"] = {k: v for k, v in mapping["data"].items() if k not in _FREE_DATA_FIELDS}
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


class RunLog:
    """Collect figures between log lines and write them as JSON lines.

    Args:
        folder: The run's folder; the log is log.jsonl in it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "log.jsonl"
        self.sums: dict[str, list[Tensor]] = {}
        self.started = time.monotonic()
        self.last_step = 0

    def add(self, name: str, value: Tensor) -> None:
        """Take a scalar tensor into the mean of a name; the device is not waited for."""
        self.sums.setdefault(name, []).append(value.detach().float())

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means since the last call, over all processes, and start anew."""
        names = list(self.sums)
        values = torch.stack([torch.stack(self.sums[name]).mean() for name in names])
        self.sums = {}
        reduced = accelerator.reduce(values, "mean").tolist()
        return dict(zip(names, reduced, strict=True))

    def start_clock(self, step: int) -> None:
        """Measure speed from this step on."""
        self.started, self.last_step = time.monotonic(), step

    def speed(self, samples_per_step: int, step: int) -> dict[str, float]:
        """Return steps and images per second since the last call, and peak memory in GiB."""
        now = time.monotonic()
        rate = (step - self.last_step) / max(now - self.started, 1e-9)
        self.started, self.last_step = now, step
        figures = {"steps_per_second": rate, "images_per_second": rate * samples_per_step}
        return figures | {"peak_memory_gib": peak_memory_gib()}

    def write(self, line: dict[str, Any]) -> None:
        """Append a line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def truncate(self, step: int) -> None:
        """Drop the lines of steps after `step`, and a line that was cut off."""
        kept = []
        if self.path.is_file():
            for text in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    is_kept = json.loads(text)["step"] <= step
                except (ValueError, KeyError, TypeError):
                    is_kept = False
                if is_kept:
                    kept.append(text + "\n")
        with whole_file(self.path) as partial:
            partial.write_text("".join(kept), encoding="utf-8")


def peak_memory_gib() -> float:
    """Return the largest memory use so far: of the accelerator, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**30
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class StopRequest:
    """While entered, the first Ctrl-C asks to stop after the step; the second one stops at once."""

    def __init__(self) -> None:
        self.is_asked = False
        self._previous: Any = None

    def __enter__(self) -> StopRequest:
        """Take over SIGINT where that is possible: in the main thread."""
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        """Give SIGINT back."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _on_signal(self, *_: object) -> None:
        if self.is_asked:
            raise KeyboardInterrupt
        self.is_asked = True
