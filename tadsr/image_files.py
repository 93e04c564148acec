"""Which files are images: names only, no pixels."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".jp2", ".j2k", ".jpx", ".webp", ".avif"}
    | {".tif", ".tiff", ".bmp", ".dib", ".tga", ".gif", ".apng", ".heic", ".heif", ".hif"}
    | {".ppm", ".pgm", ".pbm", ".pnm"}
)
"""What a folder is searched for; a file that is named itself may have any suffix."""

RAW_SUFFIXES = frozenset(
    {".dng", ".nef", ".nrw", ".cr2", ".cr3", ".crw", ".arw", ".sr2", ".srf", ".raf", ".orf"}
    | {".rw2", ".rwl", ".pef", ".srw", ".erf", ".kdc", ".dcr", ".mrw", ".mos", ".iiq", ".3fr"}
)
"""Cameras' raw files, told by their names: most are TIFFs, whose first picture is a thumbnail."""

INPUT_SUFFIXES = IMAGE_SUFFIXES | {".jxl"} | (RAW_SUFFIXES if find_spec("rawpy") else frozenset())
"""What is restored of a folder: also what is read by libraries that are extras."""


def find_images(folder: str | Path) -> list[Path]:
    """Return the images of a folder and its sub-folders, sorted; hidden ones left out."""
    root = Path(folder)
    return sorted(
        path
        for path in root.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
    )
