"""Looks at the machine, the device, the kernels and a model, for `tadsr doctor`.

Checks and timings run in processes of their own: what crashes there does not crash the caller.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence

import torch

from tadsr.doctor.findings import Finding, Report, examine
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
    known = {}
    for finding in _run("time", [f"engine {name}" for name in ENGINES], source, device, dtype):
        if finding.seconds and finding.name != "engine compile":
            known[finding.name] = finding.seconds
        yield finding
    if known:
        yield from _run("remember", [min(known, key=known.get)], source, device, dtype)


def _run(
    task: str, names: Sequence[str], source: str, device: torch.device, dtype: torch.dtype
) -> Iterator[Finding]:
    """Yield a finding for each name; if the process dies, another one does the rest."""
    left = list(names)
    command = [sys.executable, "-m", "tadsr.doctor.child", task, source]
    command += [str(device), str(dtype).removeprefix("torch.")]
    while left:
        reason = None
        with subprocess.Popen(
            [*command, *left], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as child:
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
