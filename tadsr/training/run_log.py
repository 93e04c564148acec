"""What a run says while it goes on: its log, the trackers, and a bar or lines for people."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from tadsr.errors import TrainingError
from tadsr.named_files import parse_json
from tadsr.training.recipe import flatten
from tadsr.training.training_config import TrainingConfig
from tadsr.whole_file import whole_file


class RunLog:
    """Collect figures between log lines and write them as JSON lines."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "log.jsonl"
        self.sums: dict[str, list[Tensor]] = {}
        self.start_clock(0)

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
        rate = (step - self.last_step) / max(time.monotonic() - self.started, 1e-9)
        self.start_clock(step)
        figures = {"steps_per_second": rate, "images_per_second": rate * samples_per_step}
        return figures | {"peak_memory_gib": peak_memory_gib()}

    def write(self, line: dict[str, Any]) -> None:
        """Append a line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def truncate(self, step: int) -> None:
        """Drop the lines of steps after `step`, and a line that was cut off."""
        kept = []
        for text in self.path.read_bytes().splitlines() if self.path.is_file() else ():
            with suppress(ValueError, KeyError, TypeError):
                if parse_json(text)["step"] <= step:
                    kept.append(text + b"\n")
        with whole_file(self.path) as partial:
            partial.write_bytes(b"".join(kept))


def peak_memory_gib() -> float:
    """Return the largest memory use so far: of the accelerator, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**30
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise TrainingError for a tracker whose library is missing; accelerate would say nothing."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise TrainingError(
            f"trackers must be installed, but {' and '.join(missing)} cannot be imported; "
            f"pip install {' '.join(missing)}, or leave them out"
        )


def start_trackers(accelerator: Accelerator, config: TrainingConfig) -> None:
    """Begin the run in every tracker, with its whole configuration."""
    accelerator.init_trackers("tadsr", config=flatten(asdict(config)))


def track_validation(
    accelerator: Accelerator, metrics: dict[str, dict[str, float]], picture: np.ndarray, step: int
) -> None:
    """Give a validation's figures and picture, uint8 (H, W, 3), to every tracker."""
    accelerator.log(flatten({"validation": metrics}), step=step)
    for tracker in accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({"validation": picture[None]}, step=step, **layout)


class Progress(tqdm):
    """A bar on a terminal, a line now and then elsewhere; nothing in further processes."""

    def __init__(self, step: int, total_steps: int, is_shown: bool) -> None:
        self.has_lines = is_shown and not sys.stderr.isatty()
        hidden = not is_shown or self.has_lines
        super().__init__(total=total_steps, initial=step, unit="step", disable=hidden)

    def report(self, step: int, loss: float, steps_per_second: float) -> None:
        """Show the loss; without a terminal as a line, with the time that is left."""
        self.set_postfix(loss=f"{loss:.4g}")
        if self.has_lines:
            left = tqdm.format_interval((self.total - step) / max(steps_per_second, 1e-9))
            tqdm.write(
                f"step {step} of {self.total}: loss {loss:.4g}, {steps_per_second:.3g} steps/s, "
                f"{left} left",
                file=sys.stderr,
            )
