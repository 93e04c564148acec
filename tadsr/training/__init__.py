"""Train TADSR models: distillation, and what a small model needs before it.

from tadsr.training import Trainer, TrainingConfig
Trainer(TrainingConfig(model="…", data="photos/", output="runs/mine")).train()
"""

from __future__ import annotations

import importlib

_EXPORTS = {
    "AutoencoderConfig": "tadsr.training.stages.stage_config",
    "DataConfig": "tadsr.training.data",
    "DistillationConfig": "tadsr.training.stages.stage_config",
    "OptimizerConfig": "tadsr.training.stages.stage_config",
    "TeacherConfig": "tadsr.training.stages.stage_config",
    "TimestepRamp": "tadsr.training.stages.stage_config",
    "RestoredConfig": "tadsr.training.data",
    "Trainer": "tadsr.training.trainer",
    "TrainingConfig": "tadsr.training.training_config",
    "ValidationConfig": "tadsr.training.training_config",
    "load_recipe": "tadsr.training.recipe",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    """Import a public name on first use, so that the degradation alone loads no diffusers."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    """List the public names."""
    return __all__
