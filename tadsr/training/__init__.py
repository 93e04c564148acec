"""Train TADSR models: distillation, and what a small model needs before it.

from tadsr.training import Trainer, TrainingConfig
Trainer(TrainingConfig(model="…", data="photos/", output="runs/mine")).train()
"""

from __future__ import annotations

from tadsr.lazily import lazy_names

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


# The degradation alone loads no diffusers.
__getattr__ = lazy_names(__name__, _EXPORTS)


def __dir__() -> list[str]:
    return __all__
