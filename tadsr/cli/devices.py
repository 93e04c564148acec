"""Choose the device that the command line named; torch is imported once the name makes sense."""

from __future__ import annotations

import importlib.util
import re
import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tadsr.cli.reporting import UsageError
from tadsr.lazily import lasting_imports

if TYPE_CHECKING:
    import torch

_DEVICE = re.compile(r"auto|cpu|mps|(cuda:)?\d+|cuda")


def check_device_name(name: str) -> None:
    """Check that a name is a device's, whether or not this machine has it."""
    if not _DEVICE.fullmatch(name):
        raise UsageError(f"--device must be auto, cpu, cuda, cuda:N or mps, got {name!r}")


def choose_device(name: str) -> torch.device:
    """Return the device of a name, which must exist on this machine."""
    check_device_name(name)
    name = f"cuda:{name}" if name.isdecimal() else name
    if name.startswith("cuda") and "torch" not in sys.modules:
        _check_build(name)
    with lasting_imports():
        import torch
    if name == "auto":
        # Not mps, which has not been tested on a real machine.
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    num_found = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }[device.type]
    if (device.index or 0) >= num_found:
        raise _missing(name, f"found {num_found} of that kind")
    return device


def _missing(name: str, reason: str) -> UsageError:
    return UsageError(f"--device {name} must exist, but {reason}; use --device cpu or auto")


def _check_build(name: str) -> None:
    """Check that torch is built for CUDA, without the seconds that importing it takes."""
    spec = importlib.util.find_spec("torch")
    file = Path(spec.origin).with_name("version.py")
    known = runpy.run_path(str(file)) if file.exists() else {}
    if known and known.get("cuda") is known.get("hip") is None:
        raise _missing(name, f"torch {known['__version__']} is a build without it")


def split_devices(names: str) -> list[str]:
    """Turn "0,1" or "cuda:0,cpu" into names of devices, whether or not this machine has them."""
    parts = [part.strip() for part in names.split(",")]
    if not all(parts):
        raise UsageError(f"--devices must be names with commas between, such as 0,1, got {names!r}")
    for part in parts:
        check_device_name(part)
    return parts
