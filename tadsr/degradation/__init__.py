"""Real-ESRGAN's second-order degradation, drawn apart from being applied."""

from tadsr.degradation.apply import apply_degradation
from tadsr.degradation.presets import PRESETS, DegradationConfig, find_preset
from tadsr.degradation.sample import DegradationParams, sample_degradation

__all__ = [
    "PRESETS",
    "DegradationConfig",
    "DegradationParams",
    "apply_degradation",
    "find_preset",
    "sample_degradation",
]
