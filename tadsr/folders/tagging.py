"""Describe the images of a folder, into a file that a broken-off run goes on with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tadsr.config import MAX_PIXELS
from tadsr.errors import TADSRError
from tadsr.folders.jobs import draft_folder
from tadsr.images import decode_image, read_image
from tadsr.named_files import parse_json, read_text
from tadsr.prompts import describe_images, show_to_tagger
from tadsr.whole_file import whole_file

TAGS_NAME = "tags.jsonl"
"""The file's name in the folder of the images, unless told otherwise."""
BATCH_IMAGES = 8
"""Images that a tagger is asked about at once."""
_READERS = 4


@dataclass(frozen=True)
class TagTally:
    """What became of a folder's images."""

    num_tagged: int
    """Described by this run."""
    num_known: int
    """Described before."""
    failures: tuple[str, ...]
    """Why others could not be."""


@dataclass(frozen=True)
class TagPlan:
    """Which images of a folder are to be described, and where that is written."""

    path: Path
    """The file."""
    images: dict[str, Path]
    """The images, by their names in the folder."""
    known: dict[str, dict[str, Any]]
    """What the file has already, by image."""
    described: str | None
    """Says in the file which tagger it is."""
    failures: tuple[str, ...]
    """Why parts of the folder cannot be read."""

    @property
    def wanted(self) -> list[str]:
        """The images that are not described yet."""
        return [name for name in self.images if name not in self.known]


def plan_tags(
    source: str | Path,
    out: str | Path | None = None,
    *,
    described: str | None = None,
    overwrite: bool = False,
) -> TagPlan:
    """Find the images of a folder that a file does not describe yet.

    Args:
        source: Folder with images, at any depth; hidden ones are left out.
        out: The file; None for tags.jsonl in the folder.
        described: Says in the file which tagger it is; another one's file is not gone on with.
        overwrite: Whether a file that exists is begun anew.

    Returns:
        The plan; nothing is written.

    Raises:
        ValueError: There is no image, or the file holds something else.
    """
    root = Path(source)
    if not root.is_dir():
        raise ValueError(f"source must be a folder of images, got {source}; check the path")
    path = root / TAGS_NAME if out is None else Path(out)
    drafts = list(draft_folder(root, path, path))
    images = {d.source.relative_to(root).as_posix(): d.source for d in drafts if not d.error}
    known = {} if overwrite or not path.exists() else _begin_again(path, described)
    return TagPlan(path, images, known, described, tuple(d.error for d in drafts if d.error))


def tag_images(
    plan: TagPlan,
    tagger: Callable[[Any], str],
    *,
    batch_images: int = BATCH_IMAGES,
    max_pixels: int | None = MAX_PIXELS,
    progress: Callable[[int], None] | None = None,
) -> TagTally:
    """Write what a tagger says of each image, a JSON line each: "file_name" and "tags".

    Args:
        plan: The images and the file.
        tagger: A callable from a PIL image to a text; asked about several at once if it has
            `tag_batch`.
        batch_images: Images at once, at least 1.
        max_pixels: Largest image, as for `read_image`.
        progress: Told how many more images are done.

    Returns:
        What was done; images that cannot be read are its failures.

    Raises:
        TypeError: The tagger returns anything but text.
        ValueError: `batch_images` is below 1.
        OSError: The file cannot be written.
    """
    if batch_images < 1:
        raise ValueError(f"batch_images must be at least 1, got {batch_images}")
    failures, num_tagged, wanted = list(plan.failures), 0, plan.wanted
    about = {} if plan.described is None else {"tagger": plan.described}
    with whole_file(plan.path) as partial:  # without a line that was torn
        text = "".join(json.dumps(record) + "\n" for record in plan.known.values())
        partial.write_text(text, encoding="utf-8")
    with plan.path.open("a", encoding="utf-8") as file, ThreadPoolExecutor(_READERS) as pool:
        for batch in _read_ahead(pool, plan, batch_images, max_pixels):
            images = {}
            for name, future in batch.items():
                try:
                    images[name] = future.result()
                except (TADSRError, OSError, ValueError) as error:
                    failures.append(f"{name}: {error}")
            texts = describe_images(tagger, list(images.values())) if images else []
            lines = [
                json.dumps({"file_name": name, "tags": text} | about) + "\n"
                for name, text in zip(images, texts, strict=True)
            ]
            # All at once, so that a killed run leaves at most its last line torn.
            file.write("".join(lines))
            file.flush()
            num_tagged += len(lines)
            if progress is not None:
                progress(len(batch))
    return TagTally(num_tagged, len(plan.images) - len(wanted), tuple(failures))


def read_tags(path: str | Path) -> dict[str, str]:
    """Read what `tag_folder` wrote: each image's name in its folder, and its tags."""
    return {name: record["tags"] for name, record in _read_records(Path(path))}


def _read_records(path: Path, *, may_be_torn: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} must be a readable file of tags, as `tadsr tag` writes it: {error}"
        ) from error
    for number, line in enumerate(lines, 1):
        try:
            record = parse_json(line)
            name, is_text = record["file_name"], isinstance(record["tags"], str)
        except (ValueError, KeyError, TypeError):
            is_text = False
        if is_text and isinstance(name, str):
            yield name, record
        elif not may_be_torn or number < len(lines):
            raise ValueError(
                f'{path}, line {number}, must be {{"file_name": …, "tags": …}}, got {line[:80]!r}'
            )


def _begin_again(path: Path, described: str | None) -> dict[str, dict[str, Any]]:
    """Return what a file describes already, if the same tagger wrote it."""
    known = dict(_read_records(path, may_be_torn=True))
    others = {record.get("tagger") for record in known.values()} - {described}
    if others:
        raise ValueError(
            f"{path} must be of the same tagger to go on with it, {described}, but is of "
            f"{', '.join(sorted(map(str, others)))}; name another file, or replace it "
            "(overwrite=True, --overwrite)"
        )
    return known


def _read_ahead(
    pool: ThreadPoolExecutor, plan: TagPlan, size: int, max_pixels: int | None
) -> Iterator[dict[str, Future]]:
    """Yield batches of images that are being read, while the next one is, too."""
    wanted = plan.wanted

    def start(first: int) -> dict[str, Future]:
        batch = wanted[first : first + size]
        return {name: pool.submit(show_image, plan.images[name], max_pixels) for name in batch}

    ahead = start(0)
    for first in range(0, len(wanted), size):
        batch, ahead = ahead, start(first + size)
        yield batch


def show_image(path: str | Path, max_pixels: int | None = MAX_PIXELS) -> Any:
    """Read an image as a tagger is shown it: 8 bit, upright, without alpha."""
    return show_to_tagger(decode_image(read_image(path, max_pixels=max_pixels)))
