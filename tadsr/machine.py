"""What this machine is, and what earlier runs found out about it."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from tadsr.errors import TADSRError
from tadsr.named_files import parse_json, read_text
from tadsr.version import __version__
from tadsr.whole_file import whole_file

CACHE_VARIABLE = "TADSR_CACHE"
"""Environment variable with the folder of what is remembered; ~/.cache/tadsr if it is not set."""

_LIBRARIES = ("torch", "triton", "diffusers", "transformers", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Return the versions of Python, this package and what it computes with."""
    found = {"tadsr": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found | {"torch": torch.__version__}  # with the kind of build


def check_device(device: str | int | torch.device) -> None:
    """Raise TADSRError unless torch can have tensors on a device of this machine."""
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # by the kind of device, and torch's build
        reason = str(error).partition("\n")[0].partition(". ")[0].removesuffix(".")
        raise TADSRError(
            f"device must be one that torch {torch.__version__} finds here, got {str(device)!r} "
            f"({reason}); 'cpu' is always one, and `tadsr doctor` says what else is"
        ) from error


def describe_device(device: torch.device) -> dict[str, str]:
    """Describe a device as far as results and speed depend on it."""
    if device.type != "cuda":
        name = _cpu_name() if device.type == "cpu" else f"{device.type}, {platform.machine()}"
        return {"name": name, "threads": str(torch.get_num_threads())}
    major, minor = torch.cuda.get_device_capability(device)
    return {
        "name": torch.cuda.get_device_name(device),
        "capability": f"{major}.{minor}",
        "driver": _driver(),
        "runtime": torch.version.hip or f"CUDA {torch.version.cuda}",
    }


def machine_key(device: torch.device, dtype: torch.dtype, *further: object) -> str:
    """Return a key that changes with everything that a finding about a device depends on."""
    known = versions()
    facts = [describe_device(device), str(dtype), *(known.get(n) for n in ("torch", "triton"))]
    text = json.dumps([*facts, known["tadsr"], *map(repr, further)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def recall(kind: str, key: str) -> Any:
    """Return an earlier run's finding, or None."""
    return _remembered().get(kind, {}).get(key)


def remember(kind: str, key: str, value: Any) -> None:
    """Keep a finding for later runs, where the folder can be written."""
    known = _remembered()
    known.setdefault(kind, {})[key] = value
    with suppress(OSError), whole_file(_cache_file()) as partial:
        partial.write_text(json.dumps(known, indent=1), encoding="utf-8")


def _remembered() -> dict[str, dict[str, Any]]:
    try:
        found = parse_json(read_text(_cache_file()))
    except (OSError, ValueError):
        return {}
    is_ours = isinstance(found, dict) and all(isinstance(part, dict) for part in found.values())
    return found if is_ours else {}


def cache_folder() -> Path:
    """Return the user's folder of what can be made again."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    if sys.platform == "win32":
        home = os.environ.get("LOCALAPPDATA") or home
    return Path(os.environ.get(CACHE_VARIABLE) or Path(home) / "tadsr")


def _cache_file() -> Path:
    return cache_folder() / "machine.json"


@functools.cache
def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.exists() else []
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or "CPU"


@functools.cache
def _driver() -> str:
    module = Path("/proc/driver/nvidia/version")
    if module.exists():
        found = re.search(r"Kernel Module\D*([\d.]+)", module.read_text())
        return found[1] if found else "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip().partition("\n")[0]
