"""Train TADSR models: distillation, and what a small model needs before it.

from tadsr.training import Trainer, TrainingConfig
Trainer(TrainingConfig(model="…", data="photos/", output="runs/mine")).train()
"""

from __future__ import annotations

from tadsr.lazily import lazy_names

_EXPORTS = {
    "tadsr.training.data": "DataConfig RestoredConfig",
    "tadsr.training.recipe": "load_recipe",
    "tadsr.training.stages.stage_config": (
        "AutoencoderConfig DistillationConfig OptimizerConfig TeacherConfig TimestepRamp"
    ),
    "tadsr.training.trainer": "Trainer",
    "tadsr.training.training_config": "TrainingConfig ValidationConfig",
}

__all__ = sorted(" ".join(_EXPORTS.values()).split())

# The degradation alone loads no diffusers.
__getattr__ = lazy_names(__name__, _EXPORTS)


def __dir__() -> list[str]:
    return __all__
