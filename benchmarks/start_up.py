"""Time a new user's first picture, from the command to the file.

    python benchmarks/start_up.py --out benchmarks/results/start_up_cpu.json

`tadsr upscale` of a photo of 128 × 128 px by tadsr-tiny, each time in a process of its own: seconds
on the clock and of the processor, the medians, and the same of importing torch alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

from machine import ROOT, time_command, write_report
from PIL import Image

SIDE_PX = 128


def main() -> None:
    """Run the commands and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    # As after an installation, which compiles the package: it is not compiled for each command.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    report: dict[str, object] = {"load": round(os.getloadavg()[0], 1)}
    with tempfile.TemporaryDirectory() as folder:
        photo, result = Path(folder, "photo.png"), Path(folder, "result.png")
        with Image.open(ROOT / "examples/photos/lighthouse.jpg") as image:
            image.crop((0, 0, SIDE_PX, SIDE_PX)).save(photo)
        upscale = [sys.executable, "-m", "tadsr", "upscale", str(photo), str(result)]
        commands = {
            "command to picture": [*upscale, "--overwrite", "--quiet"],
            "import torch": [sys.executable, "-c", "import torch"],
        }
        for name, command in commands.items():
            time_command(command, environment)  # files come into the system's cache
            times = [time_command(command, environment) for _ in range(options.repeats)]
            wall, cpu = (round(statistics.median(column), 2) for column in zip(*times, strict=True))
            report[name] = {"seconds": wall, "cpu_seconds": cpu}
    write_report(report, options.out)


if __name__ == "__main__":
    main()
