"""Whole folders from Python, as `tadsr upscale` does them from the shell."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tadsr.folders.jobs import Job, mirror_folder
from tadsr.folders.outcome import Outcome
from tadsr.folders.restoring import FileRequest
from tadsr.folders.resume import upscale_files
from tadsr.folders.run import Report, run_files
from tadsr.folders.workers import Load, run_on_devices

if TYPE_CHECKING:
    from tadsr.pipeline import TADSRPipeline


def upscale_folder(
    source: str | Path,
    target: str | Path,
    *,
    model: str | Path = "tadsr-tiny",
    request: FileRequest | None = None,
    suffix: str = ".png",
    devices: Sequence[str] | None = None,
    load: Load | None = None,
    report: Report | None = None,
    is_locked: bool = True,
) -> list[Outcome]:
    """Upscale every image of a folder on this machine; run again, it does what is missing.

    Args:
        source: Folder with images, at any depth.
        target: Folder of the results, of the same tree; also holds the manifest.
        model: As in `TADSRPipeline.from_pretrained`.
        request: What is done to every image.
        suffix: Of the results.
        devices: What torch calls them; several work at once, each in a process of its own, so
            that a script must guard what it starts by `if __name__ == "__main__"`. None for CUDA
            if there is any, else the CPU.
        load: Gives the pipeline on a device in place of `model`; picklable for several devices.
        report: Told each outcome as it comes.
        is_locked: Whether other runs are kept out of `target`; False where a file system has no
            locks, and no other run writes to it.

    Returns:
        The outcome of every image; one that failed is among them.

    Raises:
        ValueError: A folder does not fit, or there is no device.
        TADSRError: Another run writes to `target`, the model cannot be loaded, or the disk is full.
    """
    if devices is None:
        import torch

        devices = ["cuda" if torch.cuda.is_available() else "cpu"]
    if not devices:
        raise ValueError("devices must be at least one, got none; leave it out to choose one")
    jobs = mirror_folder(source, target, suffix)
    request = request or FileRequest()
    load = load or partial(load_pipeline, str(model))

    def run(todo: list[Job], report: Report) -> None:
        if len(devices) == 1:
            run_files(todo, request, partial(load, devices[0]), report)
        else:
            run_on_devices(todo, request, load, devices, report)

    return upscale_files(jobs, request, {"model": str(model)}, run, report, is_locked=is_locked)


def load_pipeline(model: str, device: str) -> TADSRPipeline:
    """Load a model onto a device, in the precision that is best there."""
    from tadsr.pipeline import TADSRPipeline

    return TADSRPipeline.from_pretrained(model, torch_dtype="auto").to(device)
