"""Runs that go on where an earlier one stopped: what is done is checked and left alone."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from tadsr.folders.jobs import Job
from tadsr.folders.manifest import Manifest, Record, is_changed
from tadsr.folders.outcome import Outcome
from tadsr.folders.restoring import FileRequest
from tadsr.folders.run import Report

Run = Callable[[list[Job], Report], None]
"""Upscales files and reports each: `run_files`, `run_on_devices` or a cluster's way."""


def upscale_files(
    jobs: Sequence[Job],
    request: FileRequest,
    settings: Mapping[str, Any],
    run: Run,
    report: Report,
) -> None:
    """Upscale what is not done yet, and write down what was done.

    A result that exists is left alone. One that a manifest knows is checked first, by its size in
    bytes and its header; a damaged one is made anew.

    Args:
        jobs: Which files; those with a folder are written to its manifest.
        request: What is done to each.
        settings: What results depend on beside the request, such as the model; JSON's types.
        run: How files are upscaled.
        report: Told each outcome.

    Raises:
        TADSRError: Another run writes to a folder, or what `run` raises.
        OSError: A manifest cannot be written.
    """
    with ExitStack() as stack:
        described = {**request.described(), **settings}
        manifests: dict[Path, Manifest] = {}
        for folder in dict.fromkeys(job.folder for job in jobs if job.folder is not None):
            manifest = manifests[folder] = stack.enter_context(Manifest(folder, described))
            own = [job.target for job in jobs if job.folder == folder]
            manifest.remove_abandoned(own)
            # Workers that are killed on the way leave something as well.
            stack.callback(manifest.remove_abandoned, own)
        todo = []
        for job in jobs:
            manifest = manifests.get(job.folder) if job.folder else None
            checked, reason = check_existing(job, request, manifest)
            if reason is None:
                todo.append(checked)
            elif is_image(job.target):
                report(Outcome(job, "skipped", message=reason))
            else:
                message = f"{job.target}: exists, but is no image; --overwrite replaces a file"
                report(Outcome(job, "failed", message=message))

        def note(outcome: Outcome) -> None:
            if outcome.job.folder is not None:
                manifests[outcome.job.folder].add(outcome)
            report(outcome)

        if todo:
            run(todo, note)


def check_existing(
    job: Job, request: FileRequest, manifest: Manifest | None
) -> tuple[Job, str | None]:
    """Decide whether an image is still to be done.

    Args:
        job: Which image.
        request: What would be done.
        manifest: Of the output folder, if there is one.

    Returns:
        The job, with leave to replace a damaged result; and why it is skipped, or None.
    """
    if request.overwrite or not os.path.lexists(job.target):
        return job, None
    record = manifest.find(job.target) if manifest else None
    replaces = "--overwrite replaces it"
    if manifest is None or record is None or record.error is not None:
        return job, f"{job.target}: exists, skipped; {replaces}"
    if not is_whole(job.target, record):
        return replace(job, may_replace=True), None
    if record.settings != manifest.settings:
        reason = f"was made with other settings, which {manifest.path.name} names"
        return job, f"{job.target}: exists, skipped, but {reason}; {replaces}"
    if is_changed(record, job.source):
        reason = f"{job.source} has changed since"
        return job, f"{job.target}: exists, skipped, but {reason}; {replaces}"
    return job, f"{job.target}: exists, skipped; {replaces}"


def is_whole(path: Path, record: Record) -> bool:
    """Return whether a result is what the run that made it left, by its size and its header."""
    try:
        is_as_large = os.path.getsize(path) == record.target_bytes
    except OSError:
        return False
    return is_as_large and is_image(path, (record.width, record.height))


def is_image(path: Path, size: tuple[int | None, int | None] | None = None) -> bool:
    """Return whether a file has the header of an image, of a width and height if they are given."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return size is None or image.size == size
    except Image.DecompressionBombError:
        return True  # its header is sound, and names more pixels than Pillow opens
    except UnidentifiedImageError:
        # Pillow does not know every layout of a TIFF file.
        return path.suffix.lower() in (".tif", ".tiff") and path.stat().st_size > 0
    except OSError:
        return False
