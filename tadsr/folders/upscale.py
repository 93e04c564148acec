"""Whole folders: what an earlier run has done is checked and left alone, the rest is upscaled."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, UnidentifiedImageError

from tadsr.errors import ImageTooLargeError
from tadsr.folders.jobs import Job, mirror_folder
from tadsr.folders.manifest import Manifest, Record, is_changed
from tadsr.folders.outcome import Outcome
from tadsr.folders.restoring import FileRequest, choose_target
from tadsr.folders.run import Report, run_files
from tadsr.named_files import holds_something
from tadsr.whole_file import remove_abandoned

if TYPE_CHECKING:
    from tadsr.folders.workers import Load
    from tadsr.pipeline import TADSRPipeline

Run = Callable[[list[Job], Report], None]
"""Upscales files and reports each: `run_files`, `run_on_devices` or a cluster's way."""

_MAX_DEATHS = 2
"""An image that was computed when memory ran out so often is left out, for the others' sake."""
_MAX_UNKNOWN_DEATHS = 5
"""So often for reasons that nobody knows: a crash, or a good photo whose run was stopped."""


def upscale_files(
    jobs: Sequence[Job],
    request: FileRequest,
    settings: Mapping[str, Any],
    run: Run,
    report: Report | None = None,
    *,
    is_locked: bool = True,
) -> list[Outcome]:
    """Upscale the images that are not done yet, and record them.

    A result that exists is left alone. One that a manifest knows is checked first, by its size in
    bytes and its header; a damaged one is made anew. An image that was computed when a run was
    killed comes first and by itself; after the second time that memory ran out it fails without
    being tried, and is tried again once a run has got to its end.
    """
    outcomes: list[Outcome] = []

    def tell(outcome: Outcome) -> None:
        outcomes.append(outcome)
        if report is not None:
            report(outcome)

    def remove_half_written() -> None:
        for folder in {job.target.parent for job in jobs if job.folder is not None}:
            remove_abandoned(folder)

    with ExitStack() as stack:
        described = {**request.described(), **settings}
        manifests: dict[Path, Manifest] = {}
        for folder in dict.fromkeys(job.folder for job in jobs if job.folder is not None):
            # Activations that find no room kill; what bounds them changes no result.
            means = str(request.settings.tiling)
            held = Manifest(folder, described, means, is_locked=is_locked)
            manifests[folder] = stack.enter_context(held)
        remove_half_written()
        # Workers that are killed on the way leave something as well.
        stack.callback(remove_half_written)
        todo, deadly = [], []
        for job in jobs:
            if job.error:
                tell(Outcome(job, "failed", message=job.error))
                continue
            manifest = manifests.get(job.folder) if job.folder else None
            if request.overwrite or not os.path.lexists(job.target):
                job = choose_target(job, request)
            checked, reason = check_existing(job, request, manifest)
            if reason is None:
                deaths = manifest.num_deaths(job.target) if manifest else (0, 0)
                is_too_often = deaths[0] >= _MAX_DEATHS or sum(deaths) >= _MAX_UNKNOWN_DEATHS
                is_deadly = is_too_often and not request.overwrite
                (deadly if is_deadly else todo).append(checked)
            elif (size := header_size(job.target)) and (
                (manifest and manifest.find(job.target)) or is_undamaged(job.target)
            ):
                if manifest is not None:
                    manifest.adopt(job, size)
                tell(Outcome(job, "skipped", message=reason))
            else:
                message = f"{job.target}: exists, but is no whole image; --overwrite replaces it"
                tell(Outcome(job, "failed", message=message))
        left_out = [Outcome(job, "failed", message=_death_of(job)) for job in deadly]
        for outcome in left_out:
            tell(outcome)

        # First, with nothing else under way that would be taken for the one that killed.
        todo.sort(key=lambda job: not job.alone)
        if todo:
            run(todo, _Notes(manifests, tell))
        # This makes an end of them, which the next run would take for leave to try them again.
        for outcome in left_out:
            manifests[outcome.job.folder].add(outcome)
    return outcomes


class _Notes:
    """Records a run's outcomes and passes them on."""

    def __init__(self, manifests: Mapping[Path, Manifest], report: Report) -> None:
        self._manifests, self._report = manifests, report

    def begin(self, job: Job, *, is_deadly: bool = True) -> None:
        """Record an image that is about to be computed, in case the run is killed."""
        if job.folder is not None:
            self._manifests[job.folder].begin(job.target, is_deadly=is_deadly)

    def __call__(self, outcome: Outcome) -> None:
        """Record an image's outcome."""
        if outcome.job.folder is not None:
            self._manifests[outcome.job.folder].add(outcome)
        self._report(outcome)


def check_existing(
    job: Job, request: FileRequest, manifest: Manifest | None
) -> tuple[Job, str | None]:
    """Decide whether an image is still to be done.

    Returns:
        The job, with leave to replace a damaged result, and alone if a run was killed at it; and
        why it is skipped, or None.
    """
    if manifest is not None and manifest.is_suspect(job.target):
        job = replace(job, alone=True)
    if request.overwrite or not os.path.lexists(job.target):
        return job, None
    record, reason = manifest.find(job.target) if manifest else None, ""
    if manifest is not None and record is not None and record.error is None:
        if not is_whole(job.target, record):
            return replace(job, may_replace=True), None
        if record.settings != manifest.settings:
            reason = f", but was made with other settings, which {manifest.path.name} names"
        elif is_changed(record, job.source):
            reason = f", but {job.source} has changed since"
    return job, f"{job.target}: exists, skipped{reason}; --overwrite replaces it"


def is_whole(path: Path, record: Record) -> bool:
    """Return whether a result is as its run left it, by its size and header."""
    try:
        is_as_large = os.path.getsize(path) == record.target_bytes
    except OSError:
        return False
    return is_as_large and header_size(path) in ((record.width, record.height), (None, None))


def header_size(path: Path) -> tuple[int, int] | tuple[None, None] | None:
    """Return the size that an image file's header tells; None where it has none of an image.

    Returns:
        Width and height in px; None for both where Pillow does not read them.
    """
    if not holds_something(path):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return image.size
    except Image.DecompressionBombError:
        return None, None  # its header is sound, and names more pixels than Pillow opens
    except UnidentifiedImageError:
        # Pillow does not know every layout of a TIFF file.
        is_tiff = path.suffix.lower() in (".tif", ".tiff") and path.stat().st_size > 0
        return (None, None) if is_tiff else None
    except Exception:  # a damaged file makes Pillow's plugins raise nearly anything
        return None


def is_undamaged(path: Path) -> bool:
    """Return whether an image file without a record can be read to its end."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if path.suffix.lower() in (".png", ".apng"):
                with Image.open(path) as image:
                    image.verify()  # by sums, which cost no decoding
                return True
            from tadsr.images import count_frames, read_frames, read_image  # and with them torch

            if count_frames(path) > 1:
                read_frames(path)
            else:
                read_image(path)
        return True
    except (ImageTooLargeError, Image.DecompressionBombError):
        return True  # its header is sound
    except Exception:  # as for `header_size`
        return False


def _death_of(job: Job) -> str:
    return (
        f"{job.source}: several runs ended while this image was computed, perhaps "
        "for lack of memory; try --max-memory, or run again to try it as it is"
    )


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
            from tadsr.folders.workers import run_on_devices

            run_on_devices(todo, request, load, devices, report)

    return upscale_files(jobs, request, {"model": str(model)}, run, report, is_locked=is_locked)


def load_pipeline(model: str, device: str) -> TADSRPipeline:
    """Load a model onto a device, in the precision that is best there."""
    from tadsr.pipeline import TADSRPipeline

    return TADSRPipeline.from_pretrained(model, torch_dtype="auto").to(device)
