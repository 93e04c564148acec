"""Pictures beside each other: where they differ, by how much, and a sheet that shows it."""

from tadsr.comparison.compare import Comparison, compare_images, draw_comparison
from tadsr.comparison.pictures import read_rgb8, to_rgb8
from tadsr.comparison.regions import Box, detail_map, difference_map, find_box
from tadsr.comparison.sheet import Panel, draw_sheet

__all__ = [
    "Box",
    "Comparison",
    "Panel",
    "compare_images",
    "detail_map",
    "difference_map",
    "draw_comparison",
    "draw_sheet",
    "find_box",
    "read_rgb8",
    "to_rgb8",
]
