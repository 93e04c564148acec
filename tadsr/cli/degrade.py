"""`tadsr degrade`: make low-quality partners of photographs, each with its recipe."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tadsr.cli.plan import INPUT_SUFFIXES
from tadsr.cli.reporting import (
    READABLE_ERRORS,
    DebugOption,
    UsageError,
    check_range,
    readable_errors,
    silence_libraries,
)

if TYPE_CHECKING:
    from tadsr.training.degradation import DegradationParams

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
    suffix: str
    overwrite: bool
    quiet: bool
    replay: dict[str, dict[str, Any]] | None


def degrade(
    source: Annotated[str, typer.Argument(metavar="INPUT", help="Photograph or folder.")],
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder to write to.")],
    preset: Annotated[
        Literal["realesrgan", "mild", "bicubic"],
        typer.Option("--preset", help="How bad: as from the web, as from a good camera, or plain."),
    ] = "realesrgan",
    scale: Annotated[int, typer.Option("--scale", "-s", metavar="N", help="Reduction.")] = 4,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Another one: other LQ.")] = 0,
    replay: Annotated[
        str | None,
        typer.Option("--replay", metavar="FILE", help=f"Do again what a {RECORDS} says."),
    ] = None,
    format: Annotated[
        Literal["png", "webp", "jpg"],
        typer.Option("--format", "-f", help="Of the outputs; jpg adds losses of its own."),
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
    photos, folder = _find(Path(source)), Path(output)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"OUTPUT must be a folder, but {output} is a file")
    if not photos:
        raise UsageError(f"INPUT must be a photograph or a folder of some, found none at {source}")
    if (
        folder.resolve()
        == (photos[0][0].parent if Path(source).is_file() else Path(source)).resolve()
    ):
        raise UsageError("OUTPUT must be another folder than INPUT's, or photographs were replaced")
    with readable_errors(debug):
        silence_libraries(debug)
        records = None if replay is None else dict(_read_records(Path(replay), strict=True))
        request = _Request(preset, scale, seed, f".{format}", overwrite, quiet, records)
        failures = _degrade_all(photos, folder, request)
    for failure in failures:
        typer.echo(f"Error: {failure}", err=True)
    if failures:
        raise typer.Exit(1)


def _find(source: Path) -> list[tuple[Path, str]]:
    """Return photographs with their names relative to the source, sorted."""
    if source.is_file():
        return [(source, source.name)]
    found = sorted(p for p in source.rglob("*") if p.suffix.lower() in INPUT_SUFFIXES)
    return [(p, p.relative_to(source).as_posix()) for p in found]


def _degrade_all(photos: list[tuple[Path, str]], folder: Path, request: _Request) -> list[str]:
    from tqdm import tqdm

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RECORDS
    records = dict(_read_records(path, strict=False))
    targets = _name_targets([name for _, name in photos], request.suffix)
    failures, num_written, num_skipped = [], 0, 0
    hidden = True if request.quiet else None  # None: a bar on a terminal only
    with path.open("a", encoding="utf-8") as log, tqdm(photos, unit="image", disable=hidden) as bar:
        for source, name in bar:
            target = folder / targets[name]
            if target.exists() and not request.overwrite:
                num_skipped += 1
                continue
            try:
                record = _degrade_one(source, name, target, targets[name], request)
            except READABLE_ERRORS as error:
                failures.append(f"{source}: {str(error).removeprefix(f'{source}: ')}")
                continue
            # Written line by line, so that a run that is stopped knows what it has done.
            records[name] = record
            log.write(json.dumps(record) + "\n")
            log.flush()
            num_written += 1
    _write_records(path, records)
    if not request.quiet:
        typer.echo(f"{num_written} written, {num_skipped} skipped, {len(failures)} failed")
    return failures


def _name_targets(names: list[str], suffix: str) -> dict[str, str]:
    """Name the outputs after the photographs; those that would collide keep their suffix."""
    stems: dict[str, list[str]] = {}
    for name in names:
        stems.setdefault(str(Path(name).with_suffix("")), []).append(name)
    return {
        name: f"{stem if len(group) == 1 else name}{suffix}"
        for stem, group in stems.items()
        for name in group
    }


def _degrade_one(
    source: Path, name: str, target: Path, target_name: str, request: _Request
) -> dict[str, Any]:
    from tadsr.image_io import decode_image, encode_image, read_image, write_image
    from tadsr.training.degradation import apply_degradation

    image = read_image(source)
    rgb = decode_image(image).rgb
    params = _choose(name, request)
    lq = apply_degradation(rgb[None] * 2 - 1, params)[0] / 2 + 0.5
    # Without the photograph's metadata: the LQ is upright, RGB, and another picture.
    plain = decode_image((rgb * 255).round().byte().permute(1, 2, 0).numpy())
    result = encode_image(lq, None, plain, "pil")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_image(result, target, overwrite=request.overwrite)
    return {
        "hq": name,
        "lq": Path(target_name).as_posix(),
        "hq_size": [rgb.shape[-1], rgb.shape[-2]],
        "lq_size": [lq.shape[-1], lq.shape[-2]],
        "preset": None if request.replay is not None else request.preset,
        "seed": None if request.replay is not None else request.seed,
        "degradation": params.to_dict(),
    }


def _choose(name: str, request: _Request) -> DegradationParams:
    import numpy as np

    from tadsr.training.degradation import PRESETS, DegradationParams, sample_degradation

    if request.replay is None:
        digest = hashlib.sha256(name.encode()).digest()
        rng = np.random.default_rng([request.seed, int.from_bytes(digest[:8], "big")])
        return sample_degradation(rng, PRESETS[request.preset], scale=request.scale)
    if name not in request.replay:
        raise ValueError("the replayed file must have a line of this image, but has none")
    try:
        return DegradationParams.from_dict(request.replay[name]["degradation"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the replayed line must hold a degradation: {error!r}") from error


def _read_records(path: Path, *, strict: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each line by its image's name; only `strict` stops at one that was cut off."""
    if not strict and not path.is_file():
        return
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            name = record["hq"]
        except (ValueError, KeyError, TypeError) as error:
            if strict:
                raise ValueError(
                    f"{path}, line {number}, must be a record of tadsr degrade"
                ) from error
            continue
        yield name, record


def _write_records(path: Path, records: dict[str, dict[str, Any]]) -> None:
    partial = path.with_suffix(".partial")
    text = "".join(json.dumps(records[name]) + "\n" for name in sorted(records))
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
