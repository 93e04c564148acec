"""Checks and timings in processes of their own: what crashes there does not crash the caller."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence

import torch

from tadsr.doctor.findings import Finding
from tadsr.onestep.openvino import has_openvino

KERNELS = (
    "group_norm_silu",
    "add_with_statistics",
    "geglu",
    "to_uint8_nhwc",
    "adain_color_fix_uint8",
    "wavelet_color_fix_uint8",
)
ENGINES = ("eager", "fused", "compile", *(["openvino"] if has_openvino() else []))
TIMEOUT_S = 900
"""Of one check; compiling a model takes minutes."""


def check_all(source: str, device: torch.device, dtype: torch.dtype) -> Iterator[Finding]:
    """Compare each kernel and engine with its reference."""
    names = [f"kernel {name}" for name in KERNELS]
    names += [f"engine {name}" for name in ENGINES if name != "compile"]
    yield from _run("check", names, source, device, dtype)


def time_all(source: str, device: torch.device, dtype: torch.dtype) -> Iterator[Finding]:
    """Time the engines side by side at 512 × 512 px; `engine="auto"` takes the fastest from now on.

    Only those that need no minutes of compiling are taken by it.
    """
    names = [f"engine {name}" for name in ENGINES]
    timed = []
    for finding in _run("time", names, source, device, dtype):
        timed.append(finding)
        yield finding
    known = {f.name: f.seconds for f in timed if f.seconds and f.name != "engine compile"}
    if known:
        fastest = min(known, key=known.__getitem__)
        yield from _run("remember", [fastest], source, device, dtype)


def _run(
    task: str, names: Sequence[str], source: str, device: torch.device, dtype: torch.dtype
) -> Iterator[Finding]:
    """Yield a finding for each name; if the process dies, another one does the rest."""
    left = list(names)
    while left:
        about = {"task": task, "names": left, "source": source}
        about |= {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}
        command = [sys.executable, "-m", "tadsr.doctor.child", json.dumps(about)]
        reason = None
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
            try:
                out, error = child.communicate(timeout=TIMEOUT_S * len(left))
            except subprocess.TimeoutExpired:
                child.kill()
                out, error = child.communicate()
                reason = f"not done after {TIMEOUT_S * len(left)} s"
        found = [json.loads(line) for line in out.splitlines() if line.startswith(b"{")]
        yield from (Finding(**one) for one in found)
        left = left[len(found) :]
        if left:
            last = error.decode(errors="replace").strip().rpartition("\n")[2]
            reason = reason or f"its process ended with {child.returncode}: {last[:300]}"
            yield Finding(left.pop(0), False, reason)
