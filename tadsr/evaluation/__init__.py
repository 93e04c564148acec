"""Compare results with originals, in figures and over a model's timesteps; extra `eval`."""

from tadsr.evaluation.measure import (
    Evaluation,
    Row,
    evaluate_model,
    evaluate_pairs,
    make_perceptual_metric,
)
from tadsr.evaluation.pairing import match_images
from tadsr.evaluation.plot import check_plot, plot
from tadsr.evaluation.report import format_table, write_csv, write_json
from tadsr.evaluation.sweep import TimestepSweep

__all__ = [
    "Evaluation",
    "Row",
    "TimestepSweep",
    "check_plot",
    "evaluate_model",
    "evaluate_pairs",
    "format_table",
    "make_perceptual_metric",
    "match_images",
    "plot",
    "write_csv",
    "write_json",
]
