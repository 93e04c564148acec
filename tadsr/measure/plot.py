"""The fidelity-realism curve: what a timestep gives and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from tadsr.errors import import_extra
from tadsr.measure.evaluation import HQ, Evaluation
from tadsr.measure.metrics import Metric
from tadsr.whole_file import whole_file

FIDELITY = "psnr_y"
_SUFFIXES = (".png", ".svg", ".pdf")
_SIZE_INCHES = (6.4, 4.4)
_DPI = 150
_MARKERS = "sD^vP*X"


def check_plot(metrics: Sequence[Metric], path: str | Path) -> Metric:
    """Check that a curve of metrics can be drawn, before they are measured.

    Args:
        metrics: What is measured.
        path: The file to be.

    Returns:
        The metric of realism: the first that needs no original and has a better direction, else
        the first that needs none.

    Raises:
        ValueError: psnr_y or a metric without reference is lacking, or the suffix is not known.
        TADSRError: matplotlib is not installed.
    """
    if Path(path).suffix.lower() not in _SUFFIXES:
        raise ValueError(f"a plot must end in one of {' '.join(_SUFFIXES)}, got {path}")
    free = [metric for metric in metrics if not metric.needs_reference]
    if not free or FIDELITY not in [metric.name for metric in metrics]:
        raise ValueError(
            f"a plot must have {FIDELITY}, which needs originals, and a metric without reference "
            f"such as detail, got {', '.join(metric.name for metric in metrics)}"
        )
    _matplotlib()
    return next((metric for metric in free if metric.is_higher_better is not None), free[0])


def plot(evaluation: Evaluation, path: str | Path) -> None:
    """Draw realism over fidelity: timesteps as a curve, other methods as points.

    Args:
        evaluation: With psnr_y and a metric without reference; the originals' level of the
            latter is a dashed line.
        path: PNG, SVG or PDF file, replaced if it exists.

    Raises:
        ValueError: As `check_plot`.
        TADSRError: matplotlib is not installed.
        OSError: The file cannot be written.

    Source: TADSR (arXiv 2508.16557), figure 6.
    """
    realism = check_plot(evaluation.metrics, path)
    # Not pyplot: no window system, no global state.
    figure = _matplotlib().Figure(figsize=_SIZE_INCHES, layout="constrained")
    axes = figure.add_subplot()
    points = {
        row.name: (row.mean(FIDELITY), row.mean(realism.name))
        for row in evaluation.rows
        if row.name != HQ
    }
    curve = sorted(
        (row for row in evaluation.rows if row.timestep is not None), key=lambda row: row.timestep
    )
    if curve:
        xs, ys = zip(*(points[row.name] for row in curve), strict=True)
        label = evaluation.settings.get("model") or "model"
        axes.plot(xs, ys, "o-", color="tab:red", label=label)
    own = {row.name for row in curve}
    others = [name for name in points if name not in own]
    for index, name in enumerate(others):
        axes.plot(*points[name], _MARKERS[index % len(_MARKERS)], color=f"C{index}", ms=8)
        axes.annotate(name, points[name], (8, -3), textcoords="offset points", fontsize=9)
    for index, row in enumerate(curve):
        # Above and below by turns: neighbours on the curve may lie close together.
        offset = (0, 8 if index % 2 == 0 else -15)
        axes.annotate(
            row.name, points[row.name], offset, textcoords="offset points", fontsize=9, ha="center"
        )
    if original := evaluation.row(HQ):
        axes.axhline(original.mean(realism.name), color="gray", ls="--", lw=1, label="originals")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best", fontsize=9)
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    axes.set_xlabel("PSNR-Y in dB (right is better)")
    hints = {True: "up is better", False: "down is better", None: "best near the originals'"}
    axes.set_ylabel(f"{realism.name} ({hints[realism.is_higher_better]})")
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=_DPI)


def _matplotlib() -> ModuleType:
    return import_extra("matplotlib.figure", "plots need matplotlib", "eval")
