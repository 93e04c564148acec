"""The outcome of one image of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tadsr.folders.jobs import Job


@dataclass(frozen=True)
class Outcome:
    """The outcome of one image of a run.

    Args:
        job: Which image.
        status: "written", "skipped" for a result that is there, or "failed".
        seconds: From reading to writing.
        size: Width and height of the result in px, if it was written.
        message: Why it was skipped or failed; else empty.
        traceback: Of a failure, for those who debug.
        source_bytes: Size of the file as it was read; None if it could not be.
        source_sha256: Its content's hash.
        num_frames: More than 1 for an animation.
        note: What of the file was not read, or empty.
    """

    job: Job
    status: Literal["written", "skipped", "failed"]
    seconds: float = 0.0
    size: tuple[int, int] | None = None
    message: str = ""
    traceback: str = ""
    source_bytes: int | None = None
    source_sha256: str | None = None
    num_frames: int = 1
    note: str = ""
