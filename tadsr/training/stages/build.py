"""Build the stage that a configuration describes."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path

from tadsr.checkpoints.base import (
    base_of,
    find_folder,
    is_stable_diffusion,
    load_base,
    load_start,
)
from tadsr.checkpoints.checkpoint import Checkpoint
from tadsr.checkpoints.detect import detect_format
from tadsr.errors import TADSRError, TADSRWarning
from tadsr.measure.perceptual import PerceptualDistance, make_perceptual
from tadsr.training.prompts import PromptEncoder
from tadsr.training.stages.distillation import DistillationStage
from tadsr.training.stages.from_scratch import AutoencoderStage, TeacherStage
from tadsr.training.stages.stage import Stage
from tadsr.training.stages.stage_config import (
    AutoencoderConfig,
    DistillationConfig,
    TeacherConfig,
)
from tadsr.training.training_config import TrainingConfig


def build_stage(
    config: TrainingConfig, folder: Path, perceptual: PerceptualDistance | None = None
) -> Stage:
    """Load the networks of a run and put them into its stage."""
    checkpoint = load_start(config.model, vae=config.vae, seed=config.seed)
    stage = config.stage
    if perceptual is None and not isinstance(stage, TeacherConfig):
        stage, perceptual = _choose_perceptual(stage)
    if isinstance(stage, AutoencoderConfig):
        return AutoencoderStage(checkpoint, stage, config.optimizer, perceptual)
    prompts = PromptEncoder(checkpoint, folder / "prompts")
    prompts.foresee([config.data.prompt])  # validation shows it
    if isinstance(stage, TeacherConfig):
        built = TeacherStage(checkpoint, stage, config.optimizer, prompts)
    else:
        if stage.tavsd_weight is None:
            stage = _choose_tavsd(config.model, stage)
        teacher = _load_teacher(config, stage, checkpoint)
        teacher_prompts = None if teacher is None else PromptEncoder(teacher, prompts.cache)
        if teacher_prompts is not None and teacher_prompts.identity == prompts.identity != "":
            teacher_prompts = prompts  # the same text encoder: embed each prompt once
        built = DistillationStage(
            checkpoint,
            teacher,
            stage,
            config.optimizer,
            prompts,
            teacher_prompts,
            config.seed,
            perceptual,
        )
    built.preview_prompt = config.data.prompt
    return built


def _load_teacher(
    config: TrainingConfig, stage: DistillationConfig, checkpoint: Checkpoint
) -> Checkpoint | None:
    if stage.tavsd_weight.is_zero:
        return None
    is_start = stage.teacher is None and config.vae is None
    if is_start and checkpoint.format == "stable-diffusion":
        # The start is its own teacher: read once, and one text encoder for both.
        return replace(checkpoint, unet=copy.deepcopy(checkpoint.unet))
    source = _teacher_source(config.model, stage)
    if source is None:
        raise ValueError(
            f"stage.teacher must name the teacher's checkpoint, since {config.model} holds no base "
            "model beside the student; or set stage.tavsd_weight to 0 to train without"
        )
    return load_base(source)


def _teacher_source(model: str, stage: DistillationConfig) -> str | None:
    """Return what the teacher is loaded from; None where there is none."""
    if stage.teacher is not None:
        return stage.teacher
    model = base_of(model)
    if Path(model).suffix in (".yaml", ".yml"):
        return None
    folder = find_folder(model)
    has_base = is_stable_diffusion(folder) or detect_format(folder).name == "official"
    return model if has_base else None


def _choose_tavsd(model: str, stage: DistillationConfig) -> DistillationConfig:
    has_teacher = _teacher_source(model, stage) is not None
    if not has_teacher:
        warnings.warn(
            f"{model} has no teacher beside it: training without TAVSD; name a teacher as "
            "stage.teacher to distil from it",
            TADSRWarning,
            stacklevel=4,
        )
    return replace(stage, tavsd_weight=float(has_teacher))


def _choose_perceptual(
    stage: AutoencoderConfig | DistillationConfig,
) -> tuple[AutoencoderConfig | DistillationConfig, PerceptualDistance | None]:
    """Return a stage with its perceptual distance: the one named, or the best that can be had."""
    weight = stage.perceptual_weight
    is_off = getattr(weight, "largest", weight) == 0
    if stage.perceptual != "auto":
        return stage, None if is_off else make_perceptual(stage.perceptual)
    reasons = []
    for name in () if is_off else ("lpips", "dists"):
        try:
            return replace(stage, perceptual=name), make_perceptual(name)
        except TADSRError as error:
            reasons.append(str(error))
    if reasons:
        warnings.warn(
            "training without a perceptual distance, so that detail may fade at large timesteps: "
            f"{reasons[0]}",
            TADSRWarning,
            stacklevel=4,
        )
    return replace(stage, perceptual="none", perceptual_weight=0), None
