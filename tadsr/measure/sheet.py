"""Labelled pictures on one sheet: each as a whole, and below it the same part enlarged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tadsr.measure.metrics import describe_size
from tadsr.measure.regions import Box

PANEL_PX = 320
"""Width of a picture on the sheet."""
MAX_COLUMNS = 4
"""Panels in a row, at most."""
_GAP_PX = 10
_FONT_PX = 18
_LABEL_PX = 28
_LINE_PX = 2
_PAPER, _INK, _FRAME = "white", "black", (230, 30, 30)


@dataclass(frozen=True, eq=False)
class Panel:
    """One picture of a sheet."""

    label: str
    """What stands above it."""
    image: np.ndarray
    """uint8, (H, W, 3)."""
    is_pixelated: bool = False
    """Whether it is enlarged without smoothing, so that its pixels show."""


def draw_sheet(
    panels: Sequence[Panel],
    box: Box,
    *,
    columns: int | None = None,
    panel_px: int = PANEL_PX,
    caption: str = "",
) -> Image.Image:
    """Draw pictures beside each other, a part of each enlarged below it.

    Args:
        panels: At least one; all of one size.
        box: The part, in px of the pictures; framed in each.
        columns: Panels in a row; None for at most `MAX_COLUMNS`, rows of about equal length.
        panel_px: Width of a panel in px.
        caption: A line below everything.

    Returns:
        The sheet, mode RGB.

    Raises:
        ValueError: Sizes differ, or the part does not lie inside the pictures.
    """
    height, width = panels[0].image.shape[:2]
    if any(panel.image.shape != panels[0].image.shape for panel in panels):
        sizes = (f"{describe_size(panel.image)} ({panel.label})" for panel in panels)
        raise ValueError(f"panels must have one size, got {', '.join(sizes)}")
    if not (0 <= box.left < box.right <= width and 0 <= box.top < box.bottom <= height):
        raise ValueError(f"the part must lie inside {width}×{height} px, got {tuple(box)}")
    if columns is None:
        num_rows = -(-len(panels) // MAX_COLUMNS)
        columns = -(-len(panels) // num_rows)
    num_rows = -(-len(panels) // columns)
    whole = (panel_px, max(1, round(panel_px * height / width)))
    zoom_height = panel_px * (box.bottom - box.top) / (box.right - box.left)
    zoom = (panel_px, max(1, round(zoom_height)))
    cell = (panel_px + _GAP_PX, _LABEL_PX + whole[1] + _GAP_PX + zoom[1] + _GAP_PX)
    below = _LABEL_PX if caption else 0
    sheet = Image.new(
        "RGB", (columns * cell[0] + _GAP_PX, num_rows * cell[1] + _GAP_PX + below), _PAPER
    )
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_FONT_PX)
    for index, panel in enumerate(panels):
        left = _GAP_PX + index % columns * cell[0]
        top = _GAP_PX + index // columns * cell[1]
        draw.text((left, top), _shorten(panel.label, font, panel_px), _INK, font=font)
        image = Image.fromarray(panel.image)
        top += _LABEL_PX
        sheet.paste(_resize(image, whole, panel.is_pixelated), (left, top))
        ratio = panel_px / width
        draw.rectangle(_frame(box, ratio, left, top), outline=_FRAME, width=_LINE_PX)
        top += whole[1] + _GAP_PX
        sheet.paste(_resize(image.crop(box), zoom, panel.is_pixelated), (left, top))
    if caption:
        draw.text((_GAP_PX, sheet.height - below), caption, _INK, font=font)
    return sheet


def _resize(image: Image.Image, size: tuple[int, int], is_pixelated: bool) -> Image.Image:
    is_larger = size[0] >= image.width
    filters = Image.Resampling
    smooth = filters.BICUBIC if is_larger else filters.LANCZOS
    return image.resize(size, filters.NEAREST if is_pixelated and is_larger else smooth)


def _shorten(label: str, font: ImageFont.ImageFont, width: int) -> str:
    """Cut a label's middle out until it is no wider than its panel."""
    kept = len(label)
    short = label
    while kept > 2 and font.getlength(short) > width:
        kept -= 1
        short = f"{label[: -(-kept // 2)]}...{label[len(label) - kept // 2 :]}"
    return short


def _frame(box: Box, ratio: float, left: int, top: int) -> tuple[int, int, int, int]:
    first = (left + round(ratio * box.left), top + round(ratio * box.top))
    last = (left + round(ratio * box.right), top + round(ratio * box.bottom))
    return (*first, max(first[0], last[0] - 1), max(first[1], last[1] - 1))
