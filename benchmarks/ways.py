"""Is the way that is chosen by itself the fastest? Whole images and bands, in one run.

python benchmarks/ways.py --out benchmarks/results/ways_cpu.json

Seconds are those of the CPU, since other work beside does not count in them; the ways take turns.
Memory is what the process holds more while an image is computed.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from pathlib import Path

import numpy as np
import psutil
from machine import describe_machine

from tadsr import TADSRPipeline, TileSpec

SIZES = ((512, 512), (768, 768), (1024, 1024), (1024, 1536))
WAYS = {
    "auto": ("auto", "auto"),
    "fused, whole": ("fused", None),
    "plain, whole": ("eager", None),
    "bands": ("auto", TileSpec()),
}
INTERVAL_S = 0.01


class Peak:
    """Measures what the process holds more at the most than before."""

    def __enter__(self) -> Peak:
        self._process = psutil.Process()
        self._before = self._most = self._process.memory_info().rss
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        self.mib = (self._most - self._before) / 2**20

    def _watch(self) -> None:
        while not self._ended.wait(INTERVAL_S):
            self._most = max(self._most, self._process.memory_info().rss)


def main() -> None:
    """Measure every way at every size, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tadsr-tiny")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    pipe = TADSRPipeline.from_pretrained(arguments.model)
    rng = np.random.default_rng(0)
    found = {}
    for height, width in SIZES:
        lq = rng.integers(0, 256, (height // 4, width // 4, 3), np.uint8)
        runs = {name: [] for name in WAYS}
        for _ in range(arguments.repetitions):
            for name, (engine, tiling) in WAYS.items():
                pipe.set_engine(engine)
                with Peak() as peak:
                    started = time.process_time()
                    pipe(lq, tiling=tiling, process_size=0)
                    seconds = time.process_time() - started
                runs[name].append({"cpu_seconds": round(seconds, 2), "mib": round(peak.mib)})
        found[f"{width}x{height}"] = runs
        print(f"{width}x{height}", json.dumps(runs))
    result = {"machine": describe_machine(), "model": arguments.model, "runs": found}
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
