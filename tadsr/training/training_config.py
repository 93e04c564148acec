"""What a training run is: frozen, checked at construction, serialisable as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, get_args

from tadsr.checkpoints.detect import EMBEDDED
from tadsr.config import Precision
from tadsr.degradation import DegradationConfig, find_preset
from tadsr.training.data import DataConfig
from tadsr.training.data.data_config import DEFAULT_CROP_PX
from tadsr.training.stages.stage_config import DistillationConfig, OptimizerConfig, StageConfig

_SMALL_CROP_PX = 128
"""What the models inside the package were trained on."""
_MAY_BE_INFINITE = ("max_grad_norm", "max_loss_ratio")
"""Limits that infinity switches off."""


@dataclass(frozen=True)
class ValidationConfig:
    """Fixed images that are restored now and then, for figures and for the eye."""

    photos: str | None = None
    """Folder of HQ photographs, never those trained on; None switches validation off."""
    lq: str | None = None
    """Folder of their LQ partners (same stems); None degrades the photographs' middle."""
    every_steps: int = 500
    """Steps between validations, at least 1; the last step is always validated."""
    num_images: int = 4
    """Images, the first by name, at least 1."""
    crop_px: int = 512
    """Side of the square cut from the middle of each photograph, px."""
    timesteps: tuple[int, ...] = (100, 300, 500, 800)
    """Timesteps to restore at, each 0..999."""
    degradation: str | DegradationConfig = "realesrgan"
    """As of `DataConfig`, for photographs without LQ partners; the seed is fixed."""
    keep_best: Literal["psnr_y", "ssim_y", "perceptual"] | None = None
    """Figure, as a mean over the timesteps, whose best checkpoint is kept as checkpoints/best."""

    def __post_init__(self) -> None:
        if min(self.every_steps, self.num_images, self.crop_px) < 1:
            raise ValueError(
                "every_steps, num_images and crop_px must be at least 1, got "
                f"{self.every_steps}, {self.num_images} and {self.crop_px}"
            )
        find_preset(self.degradation)
        if not self.timesteps or not all(0 <= t <= 999 for t in self.timesteps):
            raise ValueError(f"timesteps must be in 0..999, got {self.timesteps}")


@dataclass(frozen=True)
class TrainingConfig:
    """A whole run: what is trained, on what, how, and where it goes."""

    model: str
    """What to start from: a TADSR checkpoint (folder, hub id or "tadsr-tiny"), a Stable Diffusion
    2.1-base folder or hub id, or a YAML file of networks to build at random weights."""
    data: DataConfig | str
    """Photographs; a string is a `DataConfig` with that source."""
    output: str
    """Folder for checkpoints, log, pictures and the result; an interrupted run there continues."""
    stage: StageConfig = field(default_factory=DistillationConfig)
    """What is trained: the one-step student, or what a small model needs before it."""
    vae: str | None = None
    """Checkpoint whose autoencoder takes the place of the model's; None keeps the model's."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer of the stage's main model."""
    steps: int = 2000
    """Optimizer steps of the whole run, at least 1."""
    batch_size: int = 1
    """Samples per process and forward pass, at least 1."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimizer step, at least 1."""
    precision: Precision = "fp32"
    """Of forward and backward; "fp16" and "bf16" keep frozen weights in that type too."""
    device: Literal["auto", "cpu"] = "auto"
    """"auto" takes what accelerate finds; "cpu" ignores accelerators."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third slower, far less memory."""
    channels_last: bool = False
    """Keep convolution weights in NHWC order, faster on recent GPUs."""
    tf32: bool = True
    """Let GPUs multiply float32 matrices in TF32: several times faster, to about three digits."""
    compile: bool = False
    """Compile the UNets and the autoencoder (`torch.compile`): minutes at first, then faster."""
    ema_decay: float = 0.0
    """Decay of averaged weights, which are then validated and exported; in [0, 1), 0 is off."""
    seed: int = 0
    """Seed of crops, degradations, timesteps, noise and new weights, at least 0."""
    max_loss_ratio: float = 100.0
    """A loss above this many times its running mean stops the run, above 1."""
    log_every: int = 10
    """Steps between log lines, at least 1."""
    save_every: int = 500
    """Steps between checkpoints, at least 1."""
    keep_checkpoints: int = 2
    """Checkpoints kept, the newest, at least 1."""
    export_precision: Precision = "fp32"
    """Type of the exported weights; adapters keep theirs."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where the log goes as well."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Fixed images to watch."""

    def __post_init__(self) -> None:
        if isinstance(self.data, str):
            object.__setattr__(self, "data", DataConfig(self.data))
        if self.data.crop_px is None:
            crop_px = _SMALL_CROP_PX if self.model in EMBEDDED else DEFAULT_CROP_PX
            object.__setattr__(self, "data", replace(self.data, crop_px=crop_px))
        counts = ("steps", "batch_size", "gradient_accumulation_steps")
        counts += ("log_every", "save_every", "keep_checkpoints")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("precision", "export_precision"):
            if getattr(self, name) not in get_args(Precision):
                raise ValueError(
                    f"{name} must be one of {', '.join(get_args(Precision))}, "
                    f"got {getattr(self, name)!r}"
                )
        for name in ("restored_share", "perceptual_restored_share"):
            share = getattr(self.stage, name, None)
            if share is not None and not share.is_zero and self.data.restored is None:
                raise ValueError(
                    "data.restored must say where a restoration network's results are for a "
                    f"stage.{name} above 0, got None"
                )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        if self.max_loss_ratio <= 1:
            raise ValueError(f"max_loss_ratio must be above 1, got {self.max_loss_ratio}")
        unknown = set(self.trackers) - {"tensorboard", "wandb"}
        if unknown:
            raise ValueError(f"trackers must be 'tensorboard' or 'wandb', got {sorted(unknown)}")
        _check_finite(self, "")


def _check_finite(value: Any, name: str) -> None:
    """Raise ValueError for NaN, which passes all comparisons, or infinity in a configuration."""
    if is_dataclass(value):
        value = {f"{name}.{f.name}".lstrip("."): getattr(value, f.name) for f in fields(value)}
    elif isinstance(value, tuple):
        value = {f"{name}[{i}]": item for i, item in enumerate(value)}
    if isinstance(value, dict):
        for inner, item in value.items():
            _check_finite(item, inner)
    elif isinstance(value, float) and not (
        math.isfinite(value) or (value > 0 and name.rpartition(".")[2] in _MAY_BE_INFINITE)
    ):
        raise ValueError(f"{name} must be a finite number, got {value}")
