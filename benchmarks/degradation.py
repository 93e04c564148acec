"""Measure how fast training pairs are made on one core.

python benchmarks/degradation.py --photos photos/ --out benchmarks/results/degradation_cpu.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from machine import describe_machine

from tadsr.degradation import PRESETS, apply_degradation, sample_degradation
from tadsr.degradation.jpeg import compress_jpeg, simulate_jpeg
from tadsr.training import DataConfig
from tadsr.training.data import open_data

SIDE_PX = 512
QUALITY = 75


def rate(work: Callable[[int], object], seconds: float) -> float:
    """Return calls per second, after one call to warm up."""
    work(0)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        count += 1
        work(count)
    return count / (time.perf_counter() - started)


def main() -> None:
    """Measure each preset, both JPEG paths and whole samples; print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", required=True)
    parser.add_argument("--seconds", type=float, default=10.0, help="per figure")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = DataConfig(args.photos, crop_px=SIDE_PX, num_workers=0)
    batches = open_data(data, seed=0).batches(batch_size=1)
    hq = next(batches).hq

    def degrade(preset: str) -> Callable[[int], object]:
        def work(seed: int) -> object:
            rng = np.random.default_rng(seed)
            return apply_degradation(hq, sample_degradation(rng, PRESETS[preset]))

        return work

    image = hq[0] / 2 + 0.5
    figures = {f"degrade_{name}": rate(degrade(name), args.seconds) for name in PRESETS}
    figures["jpeg_pillow"] = rate(lambda _: compress_jpeg(image, QUALITY), args.seconds)
    figures["jpeg_torch"] = rate(lambda _: simulate_jpeg(image[None], [QUALITY]), args.seconds)
    figures["whole_sample"] = rate(lambda _: next(batches), args.seconds)
    batches.close()
    result = {
        "machine": describe_machine(),
        "threads": 1,
        "size_px": SIDE_PX,
        "images_per_second": {name: round(value, 2) for name, value in figures.items()},
    }
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
