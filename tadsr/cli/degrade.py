"""`tadsr degrade`: make low-quality partners of photographs, each with its recipe."""

from __future__ import annotations

import hashlib
import json
import os
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tadsr.cli.plan import Job, plan_jobs
from tadsr.cli.reporting import (
    READABLE_ERRORS,
    DebugOption,
    UsageError,
    check_range,
    readable_errors,
    silence_libraries,
)
from tadsr.whole_file import whole_file

if TYPE_CHECKING:
    from PIL import Image

    from tadsr.degradation import DegradationParams

DEGRADE_HELP = """Write low-quality copies of photographs, to train or to measure on.

\b
Examples:
  tadsr degrade photos/ lq/                   Real-ESRGAN's degradation at x4
  tadsr degrade photos/ lq/ --preset mild --seed 7
  tadsr degrade photos/ lq2/ --replay lq/degradations.jsonl

OUTPUT/degradations.jsonl says for each image what was done to it. That depends on
the seed and on the image's relative name alone, so a folder can grow later.
"""

RECORDS = "degradations.jsonl"
"""Name of the file that says what was done to each image."""


@dataclass(frozen=True)
class _Request:
    preset: str
    scale: int
    seed: int
    overwrite: bool
    quiet: bool
    debug: bool
    replay: dict[str, dict[str, Any]] | None


def degrade(
    source: Annotated[str, typer.Argument(metavar="INPUT", help="Photograph or folder.")],
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder to write to.")],
    preset: Annotated[
        Literal["realesrgan", "web", "mild", "bicubic"],
        typer.Option("--preset", help="How bad: as from the web, as from a good camera, or plain."),
    ] = "realesrgan",
    scale: Annotated[int, typer.Option("--scale", "-s", metavar="N", help="Reduction.")] = 4,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Another one: other LQ.")] = 0,
    replay: Annotated[
        str | None,
        typer.Option(
            "--replay", metavar="FILE", help=f"Do as a {RECORDS} says, not as preset, scale, seed."
        ),
    ] = None,
    format: Annotated[
        Literal["png", "webp", "jpg"],
        typer.Option("--format", "-f", help="Of the outputs; jpg and webp lose some more."),
    ] = "png",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace outputs that exist.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    debug: DebugOption = False,
) -> None:
    """Run `tadsr degrade`."""
    check_range("--scale", scale, 1, 64, "4 is what TADSR restores")
    check_range("--seed", seed, 0, 2**63 - 1, "any number will do")
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"OUTPUT must be a folder, but {output} is a file")
    with readable_errors(debug):
        jobs = plan_jobs([source], f"{output}{os.sep}", format=format, scale=scale)
        silence_libraries(debug, quiet)
        records = None if replay is None else dict(_read_records(Path(replay), strict=True))
        request = _Request(preset, scale, seed, overwrite, quiet, debug, records)
        failures = _degrade_all(_name_jobs(jobs, Path(source)), folder, request)
    for failure in failures:
        typer.echo(f"Error: {failure}", err=True)
    if failures:
        raise typer.Exit(1)


def _name_jobs(jobs: Sequence[Job], source: Path) -> dict[str, Job]:
    """Key jobs by their photograph's name relative to the source, the same on every system."""
    root = source if source.is_dir() else source.parent
    return {job.source.relative_to(root).as_posix(): job for job in jobs}


def _degrade_all(jobs: dict[str, Job], folder: Path, request: _Request) -> list[str]:
    from tqdm import tqdm

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RECORDS
    records = dict(_read_records(path, strict=False))
    _write_records(path, records)  # whole again, should a run have been killed while adding a line
    failures, num_written, num_skipped = [], 0, 0
    hidden = True if request.quiet else None  # None: a bar on a terminal only
    with (
        path.open("a", encoding="utf-8") as log,
        tqdm(jobs.items(), unit="image", disable=hidden) as bar,
    ):
        for name, job in bar:
            # A partner keeps its name when a photograph of the same stem comes to lie beside it.
            known = folder / records[name]["lq"] if name in records else job.target
            if known.exists() and not request.overwrite:
                num_skipped += 1
                continue
            try:
                record, image = _degrade_one(name, job, folder, request)
                # The line first, so that a run that is killed leaves no picture without one.
                log.write(json.dumps(record) + "\n")
                log.flush()
                _write(image, job.target, request)
            # torch raises RuntimeError where memory runs out, among other things.
            except (*READABLE_ERRORS, RuntimeError, MemoryError) as error:
                if request.debug:
                    typer.echo(traceback.format_exc(), err=True)
                message = str(error) or type(error).__name__
                failures.append(f"{job.source}: {message.removeprefix(f'{job.source}: ')}")
                continue
            records[name] = record
            num_written += 1
    _write_records(path, records)
    if not request.quiet:
        typer.echo(f"{num_written} written, {num_skipped} skipped, {len(failures)} failed")
    return failures


def _degrade_one(
    name: str, job: Job, folder: Path, request: _Request
) -> tuple[dict[str, Any], Image.Image]:
    from tadsr.degradation import apply_degradation
    from tadsr.images import decode_image, encode_image, read_image

    rgb = decode_image(read_image(job.source)).rgb
    origin, params = _choose(name, request)
    lq = apply_degradation(rgb[None] * 2 - 1, params)[0] / 2 + 0.5
    # Without the photograph's metadata: the LQ is upright, RGB, and another picture.
    plain = decode_image((rgb * 255).round().byte().permute(1, 2, 0).numpy())
    record = {
        "hq": name,
        "lq": job.target.relative_to(folder).as_posix(),
        "hq_size": [rgb.shape[-1], rgb.shape[-2]],
        "lq_size": [lq.shape[-1], lq.shape[-2]],
        **origin,
        "degradation": params.to_dict(),
    }
    return record, encode_image(lq, None, plain, "pil")


def _write(image: Image.Image, target: Path, request: _Request) -> None:
    from tadsr.images import write_image

    target.parent.mkdir(parents=True, exist_ok=True)
    write_image(image, target, overwrite=request.overwrite)


def _choose(name: str, request: _Request) -> tuple[dict[str, Any], DegradationParams]:
    """Return where a degradation is from, and the degradation."""
    import numpy as np

    from tadsr.degradation import PRESETS, DegradationParams, sample_degradation

    if request.replay is None:
        digest = hashlib.sha256(name.encode()).digest()
        rng = np.random.default_rng([request.seed, int.from_bytes(digest[:8], "big")])
        params = sample_degradation(rng, PRESETS[request.preset], scale=request.scale)
        return {"preset": request.preset, "seed": request.seed}, params
    if name not in request.replay:
        raise ValueError("the replayed file must have a line of this image, but has none")
    record = request.replay[name]
    try:
        params = DegradationParams.from_dict(record["degradation"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the replayed line must hold a degradation: {error!r}") from error
    return {"preset": record.get("preset"), "seed": record.get("seed")}, params


def _read_records(path: Path, *, strict: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each line by its image's name; only `strict` stops at one that was cut off."""
    if not strict and not path.is_file():
        return
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            name, _ = record["hq"], record["lq"]
        except (ValueError, KeyError, TypeError) as error:
            if strict:
                raise ValueError(
                    f"{path}, line {number}, must be a record of tadsr degrade"
                ) from error
            continue
        yield name, record


def _write_records(path: Path, records: dict[str, dict[str, Any]]) -> None:
    text = "".join(json.dumps(records[name]) + "\n" for name in sorted(records))
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
