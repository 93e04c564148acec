"""Upscale a folder on a Ray cluster; run again, it does what is missing.

python examples/ray_folder.py /shared/photos /shared/sharp --workers 8 --gpus-per-worker 1

The folders must have the same path on every machine. Without a cluster to connect to
(`RAY_ADDRESS`), Ray starts one on this machine.
"""

from __future__ import annotations

import argparse
from collections import Counter

from tadsr import FileRequest
from tadsr.distributed import upscale_folder_on_ray


def main(arguments: list[str] | None = None) -> None:
    """Upscale every image of a folder, at any depth."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("--model", default="tadsr-tiny")
    parser.add_argument("--timestep", type=int, help="the model's own if left out")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--gpus-per-worker", type=float, default=0)
    options = parser.parse_args(arguments)

    outcomes = upscale_folder_on_ray(
        options.source,
        options.target,
        model=options.model,
        request=FileRequest(timestep=options.timestep),
        num_workers=options.workers,
        gpus_per_worker=options.gpus_per_worker,
    )
    for outcome in outcomes:
        if outcome.status == "failed":
            print(outcome.message)
    counts = Counter(outcome.status for outcome in outcomes)
    print(", ".join(f"{counts[status]} {status}" for status in ("written", "skipped", "failed")))


if __name__ == "__main__":
    main()
