"""Where in a picture there is most to see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tadsr.measure.metrics import luma


class Box(NamedTuple):
    """A part of a picture, in px; right and bottom are the first that do not belong to it."""

    left: int
    top: int
    right: int
    bottom: int


def difference_map(images: Sequence[np.ndarray]) -> np.ndarray:
    """Return how far pictures are apart at each pixel.

    Args:
        images: At least one, uint8 (H, W, 3) each.

    Returns:
        Distance of the brightest from the darkest luma, (H, W), on the 8-bit scale.
    """
    lumas = [luma(image) for image in images]
    return np.maximum.reduce(lumas) - np.minimum.reduce(lumas)


def detail_map(image: np.ndarray) -> np.ndarray:
    """Return the magnitude of the luma's gradient at each pixel.

    Args:
        image: uint8, (H, W, 3).

    Returns:
        float64, (H, W), on the 8-bit scale.
    """
    y = luma(image)
    across = np.abs(np.diff(y, axis=1, append=y[:, -1:]))
    down = np.abs(np.diff(y, axis=0, append=y[-1:]))
    return across + down


def find_box(scores: Sequence[np.ndarray], size: tuple[int, int]) -> Box:
    """Find the part of a picture with the largest product of mean scores.

    Args:
        scores: Maps (H, W) ≥ 0 of one size, at least one.
        size: Width and height of the part in px; cut to the picture's.

    Returns:
        The part; the middle one where the product is the same everywhere.
    """
    height, width = scores[0].shape
    box_width, box_height = min(size[0], width), min(size[1], height)
    means = [_box_means(score, box_width, box_height) for score in scores]
    product = np.prod(means, axis=0)
    if np.ptp(product) <= 1e-9 * np.abs(product).max():
        top, left = (side // 2 for side in product.shape)
    else:
        top, left = np.unravel_index(int(np.argmax(product)), product.shape)
    return Box(int(left), int(top), int(left) + box_width, int(top) + box_height)


def _box_means(score: np.ndarray, box_width: int, box_height: int) -> np.ndarray:
    """Return the mean of every box that lies inside, (H − box_height + 1, W − box_width + 1)."""
    total = np.pad(score.astype(np.float64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    sums = (
        total[box_height:, box_width:]
        - total[:-box_height, box_width:]
        - total[box_height:, :-box_width]
        + total[:-box_height, :-box_width]
    )
    return np.maximum(sums, 0) / (box_width * box_height)
