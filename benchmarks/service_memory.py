"""Show how much memory a long-lived process keeps over many mixed calls.

python benchmarks/service_memory.py --calls 5000 --every 250

Sizes, timesteps, prompts' places and kinds of input change from call to call, as in a service. The
resident memory after each part is printed as JSON; it is flat where the later parts add nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from random import Random

import numpy as np
import psutil
from PIL import Image

from tadsr import TADSRPipeline


def main() -> None:
    """Run the calls and print a line for each part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tadsr-tiny")
    parser.add_argument("--calls", type=int, default=5000)
    parser.add_argument("--every", type=int, default=250)
    parser.add_argument("--largest", type=int, default=48, help="longest side of an input in px")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    pipe = TADSRPipeline.from_pretrained(arguments.model)
    process, random, begin = psutil.Process(), Random(arguments.seed), time.monotonic()
    for number in range(arguments.calls + 1):
        if number % arguments.every == 0:
            gc.collect()
            megabytes = round(process.memory_info().rss / 1e6, 1)
            seconds = round(time.monotonic() - begin, 1)
            print(json.dumps({"calls": number, "rss_mb": megabytes, "seconds": seconds}))
        call(pipe, random, arguments.largest)


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
