"""Folders upscaled by a Ray cluster, with the manifest and the checks of a run on one machine."""

from __future__ import annotations

import base64
import hashlib
import pickle
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from tadsr.errors import TADSRError, install
from tadsr.folders.jobs import Job, mirror_folder
from tadsr.folders.outcome import Outcome
from tadsr.folders.restoring import FileRequest
from tadsr.folders.run import Report, run_files
from tadsr.folders.upscale import load_pipeline, upscale_files
from tadsr.folders.workers import Load

MAX_TRIES = 2
"""An image whose worker dies so many times counts as failed."""


def upscale_folder_on_ray(
    source: str | Path,
    target: str | Path,
    *,
    model: str | Path = "tadsr-tiny",
    request: FileRequest | None = None,
    suffix: str = ".png",
    num_workers: int = 1,
    gpus_per_worker: float = 0,
    cpus_per_worker: float = 1,
    load: Load | None = None,
    report: Report | None = None,
) -> list[Outcome]:
    """Upscale every image of a folder on a Ray cluster.

    Both folders, and the model's if it is one, must have the same path on every machine, as on a
    shared file system. Uses the cluster that `ray.init` connected to, or starts one on this
    machine. A killed worker is started again and its image redone; a killed run goes on when it
    is run again. What is not listed here is as for `upscale_folder`.

    Args:
        num_workers: Actors, each with a pipeline of its own.
        gpus_per_worker: GPUs that an actor holds; above 0 it works on CUDA in float16, at 0 on
            the CPU.
        cpus_per_worker: CPU cores that an actor holds and computes with.
        load: Gives the pipeline on a device, "cuda" or "cpu", in place of `model`; picklable.

    Returns:
        The outcome of every image; one that failed is among them.

    Raises:
        ValueError: A folder or a number does not fit.
        TADSRError: Ray is missing, another run writes to `target`, or the model cannot be loaded.
    """
    if num_workers < 1 or gpus_per_worker < 0 or cpus_per_worker <= 0:
        raise ValueError(
            "num_workers must be at least 1, gpus_per_worker at least 0 and cpus_per_worker above "
            f"0, got {num_workers}, {gpus_per_worker} and {cpus_per_worker}"
        )
    ray = _import_ray()
    jobs = mirror_folder(Path(source).absolute(), Path(target).absolute(), suffix)
    request = request or FileRequest()
    load = load or partial(load_pipeline, str(model))

    def run(todo: list[Job], report: Report) -> None:
        device = "cuda" if gpus_per_worker else "cpu"
        pool = ray.data.ActorPoolStrategy(size=min(num_workers, len(todo)))
        # Ray repeats what a lost worker had not handed out, which may be written already.
        rows = [{"job": _pack(replace(job, may_replace=True))} for job in todo]
        for job in todo:
            _Tries(job).forget()  # a killed run's
        # A block for each image: what a lost worker had not handed out is one image.
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Upscaler,
            batch_size=1,
            compute=pool,
            num_gpus=gpus_per_worker or None,
            num_cpus=cpus_per_worker,
            fn_constructor_args=(load, request, device, max(1, int(cpus_per_worker))),
        )
        for row in dataset.iter_rows():
            outcome = _unpack(row["outcome"])
            if isinstance(outcome, BaseException):
                raise outcome
            report(outcome)

    return upscale_files(jobs, request, {"model": str(model)}, run, report)


class _Upscaler:
    """The actor: holds a pipeline and upscales the files that it is sent."""

    def __init__(self, load: Load, request: FileRequest, device: str, num_threads: int) -> None:
        if device == "cpu":
            import torch

            torch.set_num_threads(num_threads)
        self.load = cache(partial(load, device))
        self.request = request

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        outcomes = [self._upscale(_unpack(job)) for job in batch["job"]]
        return {"outcome": np.array([_pack(outcome) for outcome in outcomes], dtype=object)}

    def _upscale(self, job: Job) -> Outcome | BaseException:
        found: list[Outcome] = []
        try:
            pipe = self.load()
            tries = _Tries(job)
            if tries.begin() > MAX_TRIES:
                tries.forget()
                message = (
                    f"{job.source}: its worker ended {MAX_TRIES} times, perhaps for lack of memory"
                )
                return Outcome(job, "failed", message=message)
            run_files([job], self.request, lambda: pipe, found.append)
        # Raised here it would end the actor, and Ray would try again and again.
        except TADSRError as error:
            return error
        tries.forget()
        return found[0]


class _Tries:
    """Counts how often an image was begun, in a file beside its result: workers share nothing else.

    Ray restarts a dead worker forever.
    """

    def __init__(self, job: Job) -> None:
        name = hashlib.sha256(job.target.name.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        self._path = job.target.parent / f".tadsr-tries-{name}"

    def begin(self) -> int:
        """Add one and return the count."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            file.write(b".")
            return file.tell()

    def forget(self) -> None:
        """Reset the count."""
        self._path.unlink(missing_ok=True)


def _import_ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise TADSRError(
            f"tadsr.distributed needs Ray; install it with {install('ray')}"
        ) from error
    return ray


def _pack(value: Job | Outcome | BaseException) -> str:
    # Paths and tuples are no column types of Ray's; both ends are this module.
    return base64.b64encode(pickle.dumps(value)).decode()


def _unpack(text: str) -> Any:
    return pickle.loads(base64.b64decode(text))
