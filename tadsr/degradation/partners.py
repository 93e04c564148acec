"""LQ partners of photographs on disk, with a record of how each was made."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tadsr.degradation.apply import apply_degradation
from tadsr.degradation.presets import DegradationConfig, find_preset
from tadsr.degradation.sample import DegradationParams, sample_degradation
from tadsr.errors import TADSRError
from tadsr.field_checks import Count, Natural, check_fields
from tadsr.folders.jobs import Job, mirror_folder
from tadsr.images import decode_image, encode_image, read_image, to_uint8, write_image
from tadsr.named_files import parse_json, read_text
from tadsr.whole_file import whole_file

RECORDS = "degradations.jsonl"
"""Name of the file that says what was done to each photograph."""

_EXPECTED_ERRORS = (TADSRError, ValueError, TypeError, OSError, RuntimeError, MemoryError)
"""What one photograph may fail of; torch raises RuntimeError where memory runs out."""


@dataclass(frozen=True)
class PartnerSettings:
    """How the partners of a folder are made."""

    degradation: str | DegradationConfig = "realesrgan"
    """Name of a preset, or ranges of your own."""
    scale: Count = 4
    """Reduction from photograph to partner, at least 1."""
    seed: Natural = 0
    """Draws each degradation, together with the photograph's relative name."""
    replay: Mapping[str, Mapping[str, Any]] | None = None
    """Records by photograph, of `read_records`, to do again in place of drawing."""
    overwrite: bool = False
    """Whether partners that exist are made anew."""

    def __post_init__(self) -> None:
        find_preset(self.degradation)
        check_fields(self)


@dataclass
class PartnersMade:
    """The outcome of degrading a folder."""

    num_written: int = 0
    """Partners made."""
    num_skipped: int = 0
    """Partners that were there."""
    failures: dict[Path, str] = field(default_factory=dict)
    """Photographs that could not be degraded, with the reason."""


def degrade_folder(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    settings: PartnerSettings = PartnerSettings(),
    *,
    suffix: str = ".png",
) -> PartnersMade:
    """Write a low-quality partner of every photograph of a folder, as `tadsr degrade` does.

    `output`/degradations.jsonl says for each what was done to it. That depends on the seed and on
    the photograph's relative name alone, so that a folder can grow and an interrupted run go on.

    Args:
        source: Folder of photographs, at any depth.
        output: Folder of the partners; it may exist.
        settings: Ranges, scale and seed.
        suffix: Of the partners' files.

    Returns:
        How many were written, were there and failed.

    Raises:
        ValueError: `source` is no folder or holds no image.
        OSError: `output` cannot be written.
    """
    return make_partners(
        mirror_folder(source, output, suffix), Path(source), Path(output), settings
    )


def make_partners(
    jobs: Sequence[Job],
    root: Path,
    folder: Path,
    settings: PartnerSettings,
    *,
    on_photo: Callable[[Path, Exception | None], object] | None = None,
) -> PartnersMade:
    """Write the partners that jobs name; see `degrade_folder`.

    Args:
        jobs: Photographs and their targets inside `folder`.
        root: Folder that the photographs' names are relative to.
        folder: Where the records go.
        settings: Ranges, scale and seed.
        on_photo: Called after each photograph, with what went wrong or None.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RECORDS
    records = dict(read_records(path, strict=False)) if path.is_file() else {}
    _write_records(path, records)  # whole again, should a run have been killed while adding a line
    made = PartnersMade()
    with path.open("a", encoding="utf-8") as log:
        for job in jobs:
            name = job.source.relative_to(root).as_posix()  # the same on every system
            error = None
            # A partner keeps its name when a photograph of the same stem comes to lie beside it.
            known = folder / records[name]["lq"] if name in records else job.target
            if known.exists() and not settings.overwrite:
                made.num_skipped += 1
            else:
                try:
                    record, image = _degrade(name, job, folder, settings)
                    # The line first, so that a run that is killed leaves no picture without one.
                    log.write(json.dumps(record) + "\n")
                    log.flush()
                    job.target.parent.mkdir(parents=True, exist_ok=True)
                    write_image(image, job.target, overwrite=settings.overwrite)
                    records[name] = record
                    made.num_written += 1
                except _EXPECTED_ERRORS as caught:
                    error = caught
                    message = str(error) or type(error).__name__
                    made.failures[job.source] = message.removeprefix(f"{job.source}: ")
            if on_photo is not None:
                on_photo(job.source, error)
    _write_records(path, records)
    return made


def read_records(path: Path, *, strict: bool = True) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the records of a folder by their photographs' names.

    Args:
        path: The file.
        strict: Whether a line that is no record is an error, or left out as one that was cut off.

    Raises:
        ValueError: A line is no record.
        OSError: The file cannot be read.
    """
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            record = parse_json(line)
            name = record["hq"]
            if not isinstance(name, str) or not isinstance(record["lq"], str):
                raise TypeError("names must be texts")
        except (ValueError, KeyError, TypeError) as error:
            if strict:
                raise ValueError(
                    f"{path}, line {number}, must be a record of tadsr degrade"
                ) from error
            continue
        yield name, record


def _degrade(
    name: str, job: Job, folder: Path, settings: PartnerSettings
) -> tuple[dict[str, Any], Image.Image]:
    if job.error:
        raise OSError(job.error)
    rgb = decode_image(read_image(job.source)).rgb
    origin, params = _choose(name, settings)
    lq = apply_degradation(rgb[None] * 2 - 1, params)[0] / 2 + 0.5
    # Without the photograph's metadata: the LQ is upright, RGB, and another picture.
    plain = decode_image(to_uint8(rgb))
    record = {
        "hq": name,
        "lq": job.target.relative_to(folder).as_posix(),
        "hq_size": [rgb.shape[-1], rgb.shape[-2]],
        "lq_size": [lq.shape[-1], lq.shape[-2]],
        **origin,
        "degradation": params.to_dict(),
    }
    return record, encode_image(lq, None, plain, "pil")


def _choose(name: str, settings: PartnerSettings) -> tuple[dict[str, Any], DegradationParams]:
    """Return a degradation's origin, and the degradation."""
    if settings.replay is None:
        digest = hashlib.sha256(name.encode()).digest()
        rng = np.random.default_rng([settings.seed, int.from_bytes(digest[:8], "big")])
        config = settings.degradation
        params = sample_degradation(rng, find_preset(config), scale=settings.scale)
        preset = config if isinstance(config, str) else asdict(config)
        return {"preset": preset, "seed": settings.seed}, params
    if name not in settings.replay:
        raise ValueError("the replayed file must have a line of this image, but has none")
    record = settings.replay[name]
    try:
        params = DegradationParams.from_dict(record["degradation"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the replayed line must hold a degradation: {error!r}") from error
    return {"preset": record.get("preset"), "seed": record.get("seed")}, params


def _write_records(path: Path, records: Mapping[str, Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(records[name]) + "\n" for name in sorted(records))
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
