"""One photo at several timesteps: as a sheet, and in figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from tadsr.images import resize_bicubic, to_uint8
from tadsr.measure.evaluation import BASELINE, HQ, LQ, Evaluation, Row
from tadsr.measure.metrics import Metric
from tadsr.measure.pictures import to_unit
from tadsr.measure.regions import Box, detail_map, difference_map, find_box
from tadsr.measure.sheet import PANEL_PX, Panel, draw_sheet

ZOOM_SHARE = 0.3
"""Side of the part that is enlarged, over the picture's shorter side."""
MIN_ZOOM_PX = 16


@dataclass(frozen=True, eq=False)
class TimestepSweep:
    """A photo in all its versions; all but the LQ of one size."""

    lq: np.ndarray
    """uint8, (h, w, 3)."""
    results: Mapping[int, np.ndarray]
    """By timestep, uint8 (H, W, 3) each; at least one."""
    hq: np.ndarray | None = None
    """The original, uint8, (H, W, 3)."""

    @cached_property
    def bicubic(self) -> np.ndarray:
        """The LQ enlarged by bicubic, uint8, (H, W, 3)."""
        size = next(iter(self.results.values())).shape[:2]
        return to_uint8(resize_bicubic(to_unit(self.lq), size)[0])

    def find_box(self) -> Box:
        """Return the part with detail in which the timesteps differ most."""
        images = list(self.results.values())
        height, width = images[0].shape[:2]
        side = max(MIN_ZOOM_PX, round(ZOOM_SHARE * min(height, width)))
        detail = np.mean([detail_map(image) for image in images], axis=0)
        if len(images) == 1:
            return find_box([detail], (side, side))
        return find_box([difference_map(images), detail], (side, side))

    def draw(self, box: Box | None = None, *, panel_px: int = PANEL_PX) -> Image.Image:
        """Draw all versions on a labelled sheet.

        Args:
            box: What is enlarged, in px of the results; None for `find_box`.
            panel_px: Width of each picture on the sheet, in px.

        Returns:
            The sheet, mode RGB.

        Raises:
            ValueError: The part does not lie inside the results.
        """
        height, width = self.bicubic.shape[:2]
        lq = Image.fromarray(self.lq).resize((width, height), Image.Resampling.NEAREST)
        panels = [Panel(LQ, np.asarray(lq), True), Panel(BASELINE, self.bicubic)]
        panels += [Panel(f"t = {t}", image) for t, image in self.results.items()]
        panels += [] if self.hq is None else [Panel(HQ, self.hq)]
        return draw_sheet(panels, box or self.find_box(), panel_px=panel_px)

    def measure(self, metrics: Sequence[Metric], *, model_name: str = "") -> Evaluation:
        """Measure bicubic and every timestep against the original.

        Args:
            metrics: From `tadsr.measure.metrics.make_metric`.
            model_name: What the curve is called.

        Returns:
            What `format_table` and `plot` read, of one picture.

        Raises:
            ValueError: There is no original, or it is too small to be measured.
        """
        if self.hq is None:
            raise ValueError("a sweep must have an original (hq) to be measured, got none")
        rows = [
            (HQ, None, self.hq, [metric for metric in metrics if not metric.needs_reference]),
            (BASELINE, None, self.bicubic, metrics),
            *((f"t={t}", t, image, metrics) for t, image in self.results.items()),
        ]
        return Evaluation(
            tuple(metrics),
            tuple(
                Row(name, t, {"": {m.name: m.measure(image, self.hq) for m in measured}})
                for name, t, image, measured in rows
                if measured
            ),
            {"model": model_name, "num_images": 1},
        )
