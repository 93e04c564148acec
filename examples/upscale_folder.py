"""Upscale a folder in Python; run again, it does what is missing.

python examples/upscale_folder.py photos/ sharp/
python examples/upscale_folder.py photos/ sharp/ --devices cuda:0 cuda:1

`tadsr upscale photos/ sharp/ --devices 0,1` does the same from the shell.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch

from tadsr import TADSRPipeline
from tadsr.folders.jobs import Job, mirror_folder
from tadsr.folders.outcome import Outcome
from tadsr.folders.restoring import FileRequest
from tadsr.folders.resume import upscale_files
from tadsr.folders.run import Report, run_files
from tadsr.folders.workers import run_on_devices


def load(model: str, device: str) -> TADSRPipeline:
    """Load the pipeline on a device; workers call it by its name, so it is no lambda."""
    dtype = torch.float16 if device.startswith("cuda") else torch.float32
    return TADSRPipeline.from_pretrained(model, torch_dtype=dtype).to(device)


def show(outcome: Outcome) -> None:
    """Print what became of an image, as soon as it is known."""
    job = outcome.job
    print(f"{outcome.status:8} {outcome.seconds:6.1f} s  {outcome.message or job.target}")


def main(arguments: list[str] | None = None) -> None:
    """Upscale every image of a folder, at any depth."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("--model", default="tadsr-tiny")
    parser.add_argument("--timestep", type=int, default=500)
    parser.add_argument("--devices", nargs="+", default=["cpu"])
    options = parser.parse_args(arguments)

    request = FileRequest(timestep=options.timestep)
    load_on = partial(load, options.model)

    def run(todo: list[Job], report: Report) -> None:
        if len(options.devices) == 1:
            run_files(todo, request, partial(load_on, options.devices[0]), report)
        else:
            run_on_devices(todo, request, load_on, options.devices, report)

    # Skips what the manifest in the target knows to be done, and writes down what is done now.
    jobs = mirror_folder(options.source, options.target, suffix=".png")
    upscale_files(jobs, request, {"model": options.model}, run, show)


if __name__ == "__main__":
    main()
