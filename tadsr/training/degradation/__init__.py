"""Real-ESRGAN's second-order degradation, drawn apart from being applied."""

from tadsr.training.degradation.apply import apply_degradation
from tadsr.training.degradation.config import PRESETS, DegradationConfig
from tadsr.training.degradation.sample import DegradationParams, sample_degradation

__all__ = [
    "PRESETS",
    "DegradationConfig",
    "DegradationParams",
    "apply_degradation",
    "sample_degradation",
]
