"""Time a folder run on a CPU, with freed memory kept for the next image and without.

    python benchmarks/folder.py --out benchmarks/results/folder_cpu.json

`tadsr upscale` of photos of one size by tadsr-tiny in processes that take turns: seconds on the
clock and of the processor, the best of the rounds.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from machine import ROOT, time_command, write_report
from PIL import Image

WAYS = {"kept": {}, "given back": {"MALLOC_ARENA_TEST": "8"}}
"""The command leaves a process alone that has a variable of glibc's; this one has its default."""


def main() -> None:
    """Run the commands and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=2, default=(384, 256), help="of the photos, px")
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--engine", default="fused")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        photos, results = Path(folder, "photos"), Path(folder, "results")
        photos.mkdir()
        with Image.open(ROOT / "examples/photos/lighthouse.jpg") as image:
            for number in range(options.images):
                image.rotate(number).resize(options.size).save(photos / f"{number}.png")
        command = [sys.executable, "-m", "tadsr", "upscale", str(photos), str(results)]
        command += ["--process-size", "0", "--overwrite", "--quiet", "--engine", options.engine]
        for _ in range(options.rounds):
            for name, variables in WAYS.items():
                times[name].append(time_command(command, environment | variables))
    best = {name: [round(min(c), 1) for c in zip(*t, strict=True)] for name, t in times.items()}
    report: dict[str, object] = {
        name: {"seconds": wall, "cpu_seconds": cpu} for name, (wall, cpu) in best.items()
    }
    given = {"px": options.size, "images": options.images, "engine": options.engine}
    write_report(given | report, options.out)


if __name__ == "__main__":
    main()
