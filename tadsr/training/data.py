"""Random crops of photographs, degraded on the fly."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from tadsr.training.config import DataConfig
from tadsr.training.degradation import PRESETS, apply_degradation, sample_degradation

logger = logging.getLogger(__name__)

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


def load_photos(folder: str | Path, min_side_px: int) -> list[np.ndarray]:
    """Decode every photograph of a folder that is large enough to crop.

    Args:
        folder: Searched recursively for common image formats.
        min_side_px: Smaller photographs are left out.

    Returns:
        uint8 arrays (H, W, 3), in the order of their paths.

    Raises:
        ValueError: No usable photograph is there.
    """
    photos = []
    skipped = 0
    for path in sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in _SUFFIXES):
        try:
            with Image.open(path) as image:
                array = np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            logger.warning("skipping unreadable photo %s: %s", path, error)
            skipped += 1
            continue
        if min(array.shape[:2]) >= min_side_px:
            photos.append(array)
        else:
            skipped += 1
    if not photos:
        raise ValueError(
            f"data folder must hold photos of at least {min_side_px} px a side, "
            f"got none in {folder} ({skipped} skipped)"
        )
    logger.info("%d photos in %s, %d skipped", len(photos), folder, skipped)
    return photos


def crop_photo(photo: np.ndarray, crop_px: int, zoom: float, rng: np.random.Generator) -> Tensor:
    """Cut a random square, shrunk by `zoom` and flipped or turned at random.

    Args:
        photo: uint8, (H, W, 3).
        crop_px: Side of the result in px, at most the photo's shorter side.
        zoom: Wished shrinking in (0, 1]; raised as far as the photo's size requires.
        rng: Source of position and flips.

    Returns:
        (3, crop_px, crop_px), float32, in [-1, 1].
    """
    height, width = photo.shape[:2]
    source_px = min(round(crop_px / zoom), height, width)
    top = rng.integers(height - source_px + 1)
    left = rng.integers(width - source_px + 1)
    square = photo[top : top + source_px, left : left + source_px]
    if rng.random() < 0.5:
        square = square[:, ::-1]
    if rng.random() < 0.5:
        square = square[::-1]
    if rng.random() < 0.5:
        square = square.transpose(1, 0, 2)
    crop = torch.from_numpy(np.ascontiguousarray(square)).permute(2, 0, 1).float()
    if source_px != crop_px:
        size = (crop_px, crop_px)
        crop = F.interpolate(crop[None], size, mode="bicubic", antialias=True)[0]
    return (crop / 127.5 - 1).clamp(-1, 1)


def upsample_lq(lq: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring LQ images (B, 3, h, w) in [-1, 1] to the network's resolution by bicubic."""
    return F.interpolate(lq, size, mode="bicubic", antialias=True).clamp(-1, 1)


class DegradedCrops(IterableDataset):
    """Endless pairs of an HQ crop and its degraded partner at the same size.

    Args:
        photos: uint8 arrays (H, W, 3), as from `load_photos`.
        config: Crop size, zoom and degradation.
        seed: The same seed, worker count and start give the same pairs.
        start: Samples already used by an interrupted run.
    """

    def __init__(
        self, photos: list[np.ndarray], config: DataConfig, seed: int, start: int = 0
    ) -> None:
        super().__init__()
        self.photos = photos
        self.config = config
        self.seed = seed
        self.start = start

    def __iter__(self):
        """Yield (hq, lq), each (3, crop_px, crop_px) in [-1, 1], lq enlarged by bicubic."""
        worker = get_worker_info()
        rng = np.random.default_rng([self.seed, self.start, worker.id if worker else 0])
        config = self.config
        preset = PRESETS[config.degradation]
        while True:
            photo = self.photos[rng.integers(len(self.photos))]
            zoom = rng.uniform(config.min_zoom, 1.0)
            hq = crop_photo(photo, config.crop_px, zoom, rng)[None]
            params = sample_degradation(rng, preset, scale=config.scale)
            lq = upsample_lq(apply_degradation(hq, params), hq.shape[-2:])
            yield hq[0], lq[0]
