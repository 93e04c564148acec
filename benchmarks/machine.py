"""What a benchmark ran on, for its report."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import subprocess
from pathlib import Path

import torch

from tadsr import __version__


def describe_machine() -> dict[str, str]:
    """Describe what the numbers were taken on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [s for s in info.read_text().splitlines() if s.startswith("model name")]
        cpu = f"{names[0].split(':')[1].strip()}, {len(names)} cores" if names else cpu
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = {
        name: importlib.metadata.version(name)
        for name in ("diffusers", "triton")
        if importlib.util.find_spec(name) is not None
    }
    return {
        "cpu": cpu,
        "device": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **versions,
        "tadsr": __version__,
        "commit": commit,
    }
