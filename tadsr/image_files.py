"""Which files are images: names only, no pixels."""

from __future__ import annotations

from pathlib import Path

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".jp2", ".j2k", ".jpx", ".webp", ".avif"}
    | {".tif", ".tiff", ".bmp", ".dib", ".tga", ".gif", ".apng", ".heic", ".heif", ".hif"}
    | {".ppm", ".pgm", ".pbm", ".pnm"}
)
"""What a folder is searched for; a file that is named itself may have any suffix."""


def find_images(folder: str | Path) -> list[Path]:
    """Return the images of a folder and its sub-folders, sorted; hidden ones left out."""
    root = Path(folder)
    return sorted(
        path
        for path in root.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
    )
