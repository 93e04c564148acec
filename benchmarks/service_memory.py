"""Show how much memory a long-lived process keeps over many mixed calls.

    python benchmarks/service_memory.py --out benchmarks/results/service_memory_cpu.json

Sizes, timesteps and kinds of input change from call to call, as in a service. The resident memory
after each part is printed; it is flat where the later parts add nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from pathlib import Path
from random import Random

import numpy as np
import psutil
from machine import describe_machine
from PIL import Image

from tadsr import TADSRPipeline
from tadsr.demo.actions import KEPT_PRIMITIVES


def main() -> None:
    """Run the calls and print the memory after each part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tadsr-tiny")
    parser.add_argument("--calls", type=int, default=5000)
    parser.add_argument("--every", type=int, default=250)
    parser.add_argument("--largest", type=int, default=24, help="longest side of an input in px")
    parser.add_argument("--kept", type=int, default=KEPT_PRIMITIVES, help="operations kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ[name] = str(options.kept)  # read at the first operation
    pipe = TADSRPipeline.from_pretrained(options.model)
    process, random = psutil.Process(), Random(options.seed)
    parts: list[dict[str, float]] = []
    for number in range(options.calls + 1):
        if number % options.every == 0:
            gc.collect()
            cpu_seconds = round(time.process_time(), 1)
            rss_mb = round(process.memory_info().rss / 1e6, 1)
            parts.append({"calls": number, "rss_mb": rss_mb, "cpu_seconds": cpu_seconds})
            print(json.dumps(parts[-1]), flush=True)
            if options.out:
                report = {"largest": options.largest, "kept": options.kept, "parts": parts}
                options.out.write_text(json.dumps(report | describe_machine(), indent=1) + "\n")
        call(pipe, random, options.largest)


def call(pipe: TADSRPipeline, random: Random, largest: int) -> None:
    """Make one call of a kind that is drawn."""
    height, width = (random.randint(8, largest) for _ in range(2))
    pixels = np.full((height, width, 3), random.randrange(256), np.uint8)
    options = {"scale": random.choice([1, 2, 4]), "process_size": 0}
    kind = random.randrange(4)
    if kind == 0:
        pipe.sweep(pixels, sorted(random.sample(range(1000), 2)), **options)
    elif kind == 1:
        values = np.full((height, width), random.randrange(1000))
        pipe(Image.fromarray(pixels), values, **options)
    elif kind == 2:
        pipe([pixels, pixels], random.randrange(1000), **options)
    else:
        pipe(Image.fromarray(pixels).convert("RGBA"), random.randrange(1000), **options)


if __name__ == "__main__":
    main()
