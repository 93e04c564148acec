"""Folders upscaled by a Ray cluster, with the manifest and the checks of a run on one machine."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

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
    jobs = mirror_folder(Path(source).absolute(), Path(target).absolute(), suffix)
    ray = _import_ray()
    request = request or FileRequest()
    load = load or partial(load_pipeline, str(model))
    device = "cuda" if gpus_per_worker else "cpu"
    arguments = (load, request, device, max(1, int(cpus_per_worker)))
    kind = ray.remote(_Upscaler).options(
        num_gpus=gpus_per_worker,
        num_cpus=cpus_per_worker,
        max_restarts=-1,
        max_task_retries=MAX_TRIES - 1,
    )

    def run(todo: list[Job], report: Report) -> None:
        workers = [kind.remote(*arguments) for _ in range(min(num_workers, len(todo)))]
        # A worker gets its first image when it has started: in a small cluster some never may.
        pending = {worker.__ray_ready__.remote(): (worker, None) for worker in workers}
        waiting, num_done = deque(todo), 0
        while num_done < len(todo):
            (ready, *_), _ = ray.wait(list(pending))
            worker, job = pending.pop(ready)
            if job is not None:
                report(_result(ray, ready, job))
                num_done += 1
            if waiting:
                job = waiting.popleft()
                pending[worker.upscale.remote(job)] = (worker, job)

    return upscale_files(jobs, request, {"model": str(model)}, run, report)


def _result(ray: Any, reference: Any, job: Job) -> Outcome:
    """Return an image's outcome, also where its worker died each time; raise what ends the run."""
    try:
        outcome = ray.get(reference)
    except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError):
        message = f"{job.source}: its worker ended {MAX_TRIES} times, perhaps for lack of memory"
        return Outcome(job, "failed", message=message)
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


class _Upscaler:
    """The actor: holds a pipeline and upscales the files that it is sent."""

    def __init__(self, load: Load, request: FileRequest, device: str, num_threads: int) -> None:
        if device == "cpu":
            import torch

            torch.set_num_threads(num_threads)
        self.load = cache(partial(load, device))
        self.request = request

    def upscale(self, job: Job) -> Outcome | TADSRError:
        """Upscale a file; return the error that ends the run, whose type Ray would change."""
        found: list[Outcome] = []
        try:
            pipe = self.load()
            # A worker that died may have written the result before it could say so.
            run_files([replace(job, may_replace=True)], self.request, lambda: pipe, found.append)
        except TADSRError as error:
            return error
        return found[0]


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise TADSRError(
            f"tadsr.distributed needs Ray; install it with {install('ray')}"
        ) from error
    return ray
