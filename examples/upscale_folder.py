"""Upscale a folder in Python; run again, it does what is missing.

python examples/upscale_folder.py photos/ sharp/
python examples/upscale_folder.py photos/ sharp/ --devices cuda:0 cuda:1

`tadsr upscale photos/ sharp/ --devices 0,1` does the same from the shell.
"""

from __future__ import annotations

import argparse

from tadsr import FileRequest, upscale_folder
from tadsr.folders.outcome import Outcome


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
    parser.add_argument("--timestep", type=int, help="the model's own if left out")
    parser.add_argument("--devices", nargs="+", help="one or several, such as cuda:0 cuda:1")
    options = parser.parse_args(arguments)

    # Skips what the manifest in the target knows to be done, and writes down what is done now.
    outcomes = upscale_folder(
        options.source,
        options.target,
        model=options.model,
        request=FileRequest(timestep=options.timestep),
        devices=options.devices,
        report=show,
    )
    print(f"{sum(outcome.status == 'failed' for outcome in outcomes)} of {len(outcomes)} failed")


if __name__ == "__main__":
    main()
