"""Fixed images restored now and then: a picture for the eye, and figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from tadsr.degradation import apply_degradation, find_preset, sample_degradation
from tadsr.images import decode_image, read_image, to_uint8
from tadsr.measure.metrics import psnr, ssim
from tadsr.training.data import find_photos, upsample_lq
from tadsr.training.stages.stage import Stage
from tadsr.training.training_config import ValidationConfig
from tadsr.whole_file import whole_file

LABEL_PX = 18
"""Height of the captions above the columns."""


class Validator:
    """Restores the same images at the same timesteps at every validation."""

    def __init__(
        self, config: ValidationConfig, scale: int, multiple: int, has_perceptual: bool
    ) -> None:
        self.config = config
        name = config.keep_best
        if name is not None and (
            config.photos is None or (name == "perceptual" and not has_perceptual)
        ):
            needed = "a perceptual distance" if config.photos else "validation.photos"
            raise ValueError(f"validation.keep_best must have {needed} for {name!r}, got none")
        self.pairs: list[tuple[Tensor, Tensor]] = []
        if config.photos is None:
            return
        side = config.crop_px
        if side % multiple or side % scale:
            raise ValueError(
                f"validation.crop_px must be a multiple of {multiple} and of the scale {scale}, "
                f"got {side}"
            )
        photos = find_photos(config.photos)[: config.num_images]
        if not photos:
            raise ValueError(
                f"validation.photos must hold photographs, got none in {config.photos}"
            )
        for seed, path in enumerate(photos):
            self.pairs.append(self._load_pair(path, scale, seed))

    def is_due(self, step: int, is_last: bool) -> bool:
        """Tell whether to validate after a step."""
        return bool(self.pairs) and (is_last or step % self.config.every_steps == 0)

    def run(
        self, stage: Stage, device: torch.device, picture: Path
    ) -> tuple[dict[str, dict[str, float]], np.ndarray]:
        """Restore all images, write the picture, and return mean figures by column.

        Returns:
            Label such as "bicubic" or "t=100" to "psnr_y" in dB, "ssim_y" and, where the stage
            has one, "perceptual" distance; and the picture, uint8 (H, W, 3).
        """
        rows: list[dict[str, Image.Image]] = []
        sums: dict[str, dict[str, float]] = {}
        for hq, lq in self.pairs:
            bicubic = upsample_lq(lq, hq.shape[-2:])
            images = {"bicubic": bicubic}
            images |= stage.preview(hq.to(device), bicubic.to(device), self.config.timesteps)
            hq = hq.to(device)
            arrays = {label: _to_uint8(image) for label, image in images.items()}
            original = _to_uint8(hq)
            for label, array in arrays.items():
                figures = {"psnr_y": psnr(array, original), "ssim_y": ssim(array, original)}
                if stage.perceptual is not None:
                    image = images[label].to(device).clamp(-1, 1)
                    figures["perceptual"] = stage.perceptual_distance(image, hq).item()
                for name, value in figures.items():
                    mean = sums.setdefault(label, {}).setdefault(name, 0.0)
                    sums[label][name] = mean + value / len(self.pairs)
            nearest = F.interpolate(lq, hq.shape[-2:], mode="nearest")
            rows.append({"LQ": _to_uint8(nearest), **arrays, "HQ": original})
        grid = make_grid(rows)
        with whole_file(picture) as partial:
            grid.save(partial, "PNG")
        return sums, np.asarray(grid)

    def score(self, metrics: dict[str, dict[str, float]]) -> float:
        """Return the mean of `keep_best` over what was restored, larger for better."""
        name = self.config.keep_best
        values = [figures[name] for label, figures in metrics.items() if label != "bicubic"]
        return float(np.mean(values)) * (-1 if name == "perceptual" else 1)

    def _load_pair(self, path: Path, scale: int, seed: int) -> tuple[Tensor, Tensor]:
        side = self.config.crop_px
        hq = _read(path)
        height, width = hq.shape[-2:]
        if min(height, width) < side:
            raise ValueError(
                f"validation.photos must be at least crop_px ({side}) px a side, got "
                f"{width}×{height} in {path}"
            )
        # A multiple of the scale, so that a stored LQ can be cut at the same place.
        top, left = ((size - side) // 2 // scale * scale for size in (height, width))
        crop = hq[..., top : top + side, left : left + side]
        if self.config.lq is None:
            rng = np.random.default_rng(seed)
            params = sample_degradation(rng, find_preset(self.config.degradation), scale=scale)
            return crop, apply_degradation(crop, params)
        partners = {p.stem: p for p in find_photos(self.config.lq)}
        if path.stem not in partners:
            raise ValueError(f"validation.lq must hold a partner of {path.name}, but has none")
        lq = _read(partners[path.stem])
        if lq.shape[-2:] != (height // scale, width // scale):
            raise ValueError(
                f"{partners[path.stem]} must be {width // scale}×{height // scale} px, "
                f"got {lq.shape[-1]}×{lq.shape[-2]}"
            )
        top, left, side = top // scale, left // scale, side // scale
        return crop, lq[..., top : top + side, left : left + side]


def make_grid(rows: list[dict[str, np.ndarray]]) -> Image.Image:
    """Lay out images in rows with a caption above each column.

    Args:
        rows: Caption to uint8 image (H, W, 3), the same captions and sizes in every row.
    """
    captions = list(rows[0])
    height, width = rows[0][captions[0]].shape[:2]
    grid = Image.new("RGB", (width * len(captions), LABEL_PX + height * len(rows)), "white")
    draw = ImageDraw.Draw(grid)
    for column, caption in enumerate(captions):
        draw.text((column * width + 4, 3), caption, fill="black")
        for row, images in enumerate(rows):
            place = (column * width, LABEL_PX + row * height)
            grid.paste(Image.fromarray(images[caption]), place)
    return grid


def _read(path: Path) -> Tensor:
    """Read an image as (1, 3, H, W) in [-1, 1]."""
    return decode_image(read_image(path)).rgb[None] * 2 - 1


def _to_uint8(image: Tensor) -> np.ndarray:
    """Turn (1, 3, H, W) in about [-1, 1] into uint8 (H, W, 3)."""
    return to_uint8(image[0].float() / 2 + 0.5)
