"""Build the stage that a configuration describes."""

from __future__ import annotations

from pathlib import Path

from tadsr.checkpoints.base import find_folder, is_stable_diffusion, load_base
from tadsr.checkpoints.checkpoint import Checkpoint
from tadsr.checkpoints.detect import detect_format
from tadsr.checkpoints.runs import base_of, load_start
from tadsr.measure.perceptual import PerceptualDistance
from tadsr.training.prompts import PromptEncoder
from tadsr.training.stages.autoencoder import AutoencoderStage
from tadsr.training.stages.base import Stage
from tadsr.training.stages.distillation import DistillationStage
from tadsr.training.stages.stage_config import AutoencoderConfig, DistillationConfig, TeacherConfig
from tadsr.training.stages.teacher import TeacherStage
from tadsr.training.training_config import TrainingConfig


def build_stage(
    config: TrainingConfig, folder: Path, perceptual: PerceptualDistance | None = None
) -> Stage:
    """Load the networks of a run and put them into its stage.

    Args:
        config: The run.
        folder: The run's folder; prompt embeddings are cached in it.
        perceptual: Replaces the distance that the configuration names.

    Returns:
        The stage, on the CPU.

    Raises:
        CheckpointError: A model is missing, unfit or predicts anything but noise.
        ValueError: A value does not fit the model.
    """
    stage = _build(config, folder / "prompts", perceptual)
    stage.preview_prompt = config.data.prompt
    return stage


def _build(config: TrainingConfig, cache: Path, perceptual: PerceptualDistance | None) -> Stage:
    checkpoint = load_start(config.model, vae=config.vae, seed=config.seed)
    stage = config.stage
    if isinstance(stage, AutoencoderConfig):
        return AutoencoderStage(checkpoint, stage, config.optimizer, perceptual)
    prompts = PromptEncoder(checkpoint, cache)
    if isinstance(stage, TeacherConfig):
        return TeacherStage(checkpoint, stage, config.optimizer, prompts)
    teacher = _load_teacher(config.model, stage)
    return DistillationStage(
        checkpoint,
        teacher,
        stage,
        config.optimizer,
        prompts,
        None if teacher is None else PromptEncoder(teacher, cache),
        config.seed,
        perceptual,
    )


def _load_teacher(model: str, stage: DistillationConfig) -> Checkpoint | None:
    if stage.tavsd_weight.is_zero:
        return None
    if stage.teacher is not None:
        return load_base(stage.teacher)
    model = base_of(model)
    is_built = Path(model).suffix in (".yaml", ".yml")
    folder = None if is_built else find_folder(model)
    if folder is None or not (
        is_stable_diffusion(folder) or detect_format(folder).name == "official"
    ):
        raise ValueError(
            f"stage.teacher must name the teacher's checkpoint, since {model} holds no base model "
            "beside the student; or set stage.tavsd_weight to 0 to train without"
        )
    return load_base(model)
