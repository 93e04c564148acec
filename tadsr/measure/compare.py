"""Two pictures, and perhaps the original, against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from tadsr.measure.metrics import describe_size, make_metric
from tadsr.measure.regions import Box, difference_map, find_box
from tadsr.measure.sheet import PANEL_PX, Panel, draw_sheet

ZOOM_SHARE = 0.25
"""Side of the part that is enlarged, over the picture's shorter side."""
MIN_ZOOM_PX = 16
_VISIBLE_QUANTILE = 0.995
"""Differences are amplified until this share of the pixels just does not saturate."""
_MAX_AMPLIFICATION = 64
_COLUMNS = 3
_MEASURES = ("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb")


@dataclass(frozen=True)
class Comparison:
    """How pictures differ."""

    names: tuple[str, ...]
    """What the pictures are called, two or three."""
    figures: dict[tuple[str, str], dict[str, float]]
    """Of each pair of names, PSNR in dB and SSIM."""
    box: Box
    """Where the first two differ most, in px."""
    amplification: dict[tuple[str, str], int]
    """Of each pair, the factor that makes the differences visible; one for both to the original,
    so that they can be compared."""


def compare_images(
    a: np.ndarray,
    b: np.ndarray,
    hq: np.ndarray | None = None,
    *,
    names: Sequence[str] = ("A", "B", "HQ"),
    border_px: int = 4,
) -> Comparison:
    """Measure two pictures against each other and against an original.

    Args:
        a: uint8, (H, W, 3).
        b: As `a`, of its size.
        hq: The original, of their size; None for none.
        names: What the pictures are called in the figures.
        border_px: Rim that PSNR and SSIM leave out.

    Returns:
        The comparison.

    Raises:
        TypeError: A picture is not a uint8 array.
        ValueError: Sizes differ or are too small to measure, or two names are the same.
        TADSRError: scikit-image is not installed.
    """
    images = [image for image in (a, b, hq) if image is not None]
    if any(image.shape != a.shape for image in images):
        found = ", ".join(
            f"{describe_size(image)} ({name})" for name, image in zip(names, images, strict=False)
        )
        raise ValueError(f"pictures to compare must have one size, got {found}; resize or crop")
    names = tuple(names[: len(images)])
    if len(set(names)) < len(images):
        raise ValueError(f"names must be different ones, one per picture, got {names}")
    pairs = [(0, 1)] if hq is None else [(0, 1), (0, 2), (1, 2)]
    metrics = [make_metric(name, border_px=border_px) for name in _MEASURES]
    figures = {
        (names[i], names[j]): {m.name: m.measure(images[i], images[j]) for m in metrics}
        for i, j in pairs
    }
    side = max(MIN_ZOOM_PX, round(ZOOM_SHARE * min(a.shape[:2])))
    box = find_box([difference_map([a, b])], (side, side))
    factors = [_amplification(images[i], images[j]) for i, j in pairs]
    factors[1:] = [min(factors[1:])] * len(factors[1:]) if hq is not None else []
    return Comparison(names, figures, box, dict(zip(figures, factors, strict=True)))


def draw_comparison(
    comparison: Comparison,
    a: np.ndarray,
    b: np.ndarray,
    hq: np.ndarray | None = None,
    *,
    panel_px: int = PANEL_PX,
) -> Image.Image:
    """Draw pictures side by side, their differences, and where they differ most.

    Args:
        comparison: Of the same pictures.
        a: uint8, (H, W, 3).
        b: As `a`.
        hq: As `a`; None for none.
        panel_px: Width of each picture on the sheet, in px.

    Returns:
        The sheet, mode RGB.
    """
    images = [image for image in (a, b, hq) if image is not None]
    by_name = dict(zip(comparison.names, images, strict=True))
    panels = [Panel(name, image, True) for name, image in by_name.items()]
    for (first, second), factor in comparison.amplification.items():
        difference = np.minimum(_difference(by_name[first], by_name[second]) * factor, 255)
        # Pillow's own font has no sign for minus or times.
        label = f"{factor} x |{first} - {second}|"
        panels.append(Panel(label, difference.astype(np.uint8), True))
    return draw_sheet(panels, comparison.box, columns=_COLUMNS, panel_px=panel_px)


def _difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a.astype(np.int32) - b)


def _amplification(a: np.ndarray, b: np.ndarray) -> int:
    visible = float(np.quantile(_difference(a, b).max(axis=2), _VISIBLE_QUANTILE))
    return max(1, min(_MAX_AMPLIFICATION, int(255 / max(visible, 1))))
