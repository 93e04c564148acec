"""What a benchmark ran on, for its report. Imported first, it lets a checkout be run as it is."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
if importlib.util.find_spec("tadsr") is None:
    sys.path.insert(0, str(ROOT))


def time_command(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Return the seconds that a command takes on the clock and of the processor."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, env=environment)
    seconds, after = time.monotonic() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def write_report(report: dict[str, object], out: Path | None) -> None:
    """Print what was measured, with the machine, and write it to a file if one is named."""
    text = json.dumps(report | describe_machine(), indent=1)
    print(text)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")


def describe_machine() -> dict[str, str]:
    """Describe what the numbers were taken on.

    The commit is the checkout's, or what the variable GIT_COMMIT names where a copy has none.
    """
    from tadsr import __version__

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [s for s in info.read_text().splitlines() if s.startswith("model name")]
        cpu = f"{names[0].split(':')[1].strip()}, {len(names)} cores" if names else cpu
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    git = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=False)
    device, cuda = "CPU", {}
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
        cuda = {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
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
        **cuda,
        **versions,
        "tadsr": __version__,
        "commit": git.stdout.strip() or os.environ.get("GIT_COMMIT", "unknown"),
    }
