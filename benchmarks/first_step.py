"""Time a new user's first training step, from the command to the trained model.

    python benchmarks/first_step.py benchmarks/photos --out benchmarks/results/first_step_cpu.json

CPU seconds of `tadsr train --model tadsr-tiny --steps 1` on one thread, with its workers: imports,
the model, the photos, the step, its checkpoint and the export, so no less than the step alone took.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from machine import time_command, write_report


def main() -> None:
    """Run the command and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tadsr", "train", "--model", "tadsr-tiny", "--steps", "1"]
        command += ["--data", str(options.photos.resolve()), "--output", str(Path(folder, "run"))]
        _, cpu = time_command(command, os.environ | {"OMP_NUM_THREADS": "1"})
    write_report({"cpu_seconds": round(cpu, 1), "threads": 1}, options.out)


if __name__ == "__main__":
    main()
