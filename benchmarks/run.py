"""Run every benchmark of speed on the device there is, unattended, within ten minutes.

python benchmarks/run.py

Needs no network: weights are random. Writes `kernels_DEVICE.json` and `engine_DEVICE.json` with a
`.txt` beside each that holds the table as it was printed. The exit code is 1 if a result is wrong
or a benchmark did not end.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

ENGINE_SHARE = 0.75
"""Of the time; what the engine leaves is the kernels', which it has compiled."""
GRACE_S = 10
"""For a benchmark to end by itself."""
TOTAL_S = 570


def main() -> int:
    """Run the benchmarks one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--budget-s", type=float, default=TOTAL_S)
    options = parser.parse_args()
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    device = re.sub(r"\W+", "_", name.lower())
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + options.budget_s
    is_right = True
    for benchmark in ("engine", "kernels"):
        left = deadline - time.monotonic()
        out = options.out / f"{benchmark}_{device}.json"
        command = [sys.executable, str(Path(__file__).parent / f"{benchmark}.py"), "--out", out]
        if benchmark == "engine":
            command += ["--budget-s", str(ENGINE_SHARE * left)]
            left = ENGINE_SHARE * left + GRACE_S
        is_right &= run(command, out.with_suffix(".txt"), left)
    return int(not is_right)


def run(command: list[object], table: Path, seconds: float) -> bool:
    """Run a benchmark, show what it prints and keep it; tell whether it ended well."""
    print(f"== {table.stem}", flush=True)
    with table.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=file, stderr=subprocess.STDOUT
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            file.write("broken off: no time was left\n")
            code = None
    print(table.read_text(encoding="utf-8"), flush=True)
    return code == 0


if __name__ == "__main__":
    sys.exit(main())
