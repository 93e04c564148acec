"""Evaluations as a table for people, and as CSV and JSON for programs."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path

from tadsr.measure.evaluation import Evaluation, Row
from tadsr.measure.metrics import Metric
from tadsr.whole_file import whole_file

_ARROWS = {True: " ↑", False: " ↓", None: ""}
_JSON_NOTE = (
    "null stands for an infinite PSNR (equal images) or a value that is no number; "
    "means are over the other values"
)


def format_table(evaluation: Evaluation) -> str:
    """Return the means as aligned text, with the pictures won against bicubic.

    Args:
        evaluation: What to show.

    Returns:
        A heading, a line of columns (↑: higher is better, ↓: lower), a line per row and, where
        values were left out of means, a note.
    """
    metrics = evaluation.metrics
    num_images = evaluation.settings.get("num_images", 0)
    has_wins = any(evaluation.wins(r, m) is not None for r in evaluation.rows for m in metrics)
    heading = f"{num_images} image{'s' * (num_images != 1)}; mean"
    if has_wins:
        heading += " (images better than bicubic)"
    cells = [["", *(metric.name + _ARROWS[metric.is_higher_better] for metric in metrics)]]
    for row in evaluation.rows:
        cells.append([row.name, *(_format_cell(evaluation, row, metric) for metric in metrics)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells
    ]
    return "\n".join([heading, *lines, *_left_out(evaluation)])


def write_csv(evaluation: Evaluation, path: str | Path) -> None:
    """Write one line per method and picture, and one per method with the picture "mean".

    Args:
        evaluation: What to write.
        path: The file, replaced if it exists; the settings stand in columns of their own, an
            infinite PSNR as "inf".

    Raises:
        OSError: The file cannot be written.
    """
    names = [metric.name for metric in evaluation.metrics]
    settings = {k: v for k, v in evaluation.settings.items() if isinstance(v, str | int | float)}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "timestep", "image", *names, *settings])
    for row in evaluation.rows:
        means = {m.name: row.mean(m.name) for m in evaluation.metrics if _is_measured(row, m)}
        for picture, values in [*row.values.items(), ("mean", means)]:
            figures = [values.get(name, "") for name in names]
            writer.writerow([row.name, row.timestep, picture, *figures, *settings.values()])
    with whole_file(path) as partial:
        partial.write_text(text.getvalue(), encoding="utf-8", newline="")


def write_json(evaluation: Evaluation, path: str | Path) -> None:
    """Write settings, means, wins and all values.

    Args:
        evaluation: What to write.
        path: The file, replaced if it exists; JSON has no infinity, so null stands for it.

    Raises:
        OSError: The file cannot be written.
    """
    metrics = evaluation.metrics
    report = {
        "settings": evaluation.settings,
        "note": _JSON_NOTE,
        "metrics": {
            m.name: {
                "is_higher_better": m.is_higher_better,
                "needs_reference": m.needs_reference,
                "border_px": m.border_px,
            }
            for m in metrics
        },
        "rows": [
            {
                "name": row.name,
                "timestep": row.timestep,
                "means": {
                    m.name: _finite(row.mean(m.name)) for m in metrics if _is_measured(row, m)
                },
                "wins_over_bicubic": {
                    m.name: wins for m in metrics if (wins := evaluation.wins(row, m)) is not None
                },
                "images": {
                    picture: {name: _finite(value) for name, value in values.items()}
                    for picture, values in row.values.items()
                },
            }
            for row in evaluation.rows
        ],
    }
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    with whole_file(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def _is_measured(row: Row, metric: Metric) -> bool:
    return any(metric.name in values for values in row.values.values())


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _format_cell(evaluation: Evaluation, row: Row, metric: Metric) -> str:
    if not _is_measured(row, metric):
        return "–"
    wins = evaluation.wins(row, metric)
    return f"{row.mean(metric.name):.4f}" + ("" if wins is None else f" ({wins})")


def _left_out(evaluation: Evaluation) -> Iterator[str]:
    for row in evaluation.rows:
        for metric in evaluation.metrics:
            if count := row.num_left_out(metric.name):
                yield (
                    f"{row.name}, {metric.name}: {count} infinite (equal images) or undefined "
                    f"value{'s' * (count != 1)} left out of the mean"
                )
