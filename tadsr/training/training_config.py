"""What a training run is: frozen, checked at construction, serialisable as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from tadsr.checkpoints.detect import EMBEDDED
from tadsr.config import Precision
from tadsr.degradation import DegradationConfig, find_preset
from tadsr.field_checks import Count, Natural, Place, Probability, Within, check_fields
from tadsr.training.data import DataConfig
from tadsr.training.data.data_config import DEFAULT_CROP_PX
from tadsr.training.stages.stage_config import DistillationConfig, OptimizerConfig, StageConfig

_SMALL_CROP_PX = 128
"""What the models inside the package were trained on."""


@dataclass(frozen=True)
class ValidationConfig:
    """Fixed images that are restored now and then, for figures and for the eye."""

    photos: Place | None = None
    """Folder of HQ photographs, never those trained on; None switches validation off."""
    lq: Place | None = None
    """Folder of their LQ partners (same stems); None degrades the photographs' middle."""
    every_steps: Count = 500
    """Steps between validations, at least 1; the last step is always validated."""
    num_images: Count = 4
    """Images, the first by name, at least 1."""
    crop_px: Count = 512
    """Side of the square cut from the middle of each photograph, px."""
    timesteps: Annotated[tuple[int, ...], Within(0, 999)] = (100, 300, 500, 800)
    """Timesteps to restore at, each 0..999."""
    degradation: str | DegradationConfig = "realesrgan"
    """As of `DataConfig`, for photographs without LQ partners; the seed is fixed."""
    keep_best: Literal["psnr_y", "ssim_y", "perceptual"] | None = None
    """Figure, as a mean over the timesteps, whose best checkpoint is kept as checkpoints/best."""

    def __post_init__(self) -> None:
        check_fields(self)
        find_preset(self.degradation)
        if not self.timesteps:
            raise ValueError("timesteps must be at least one, got none")


@dataclass(frozen=True)
class TrainingConfig:
    """A whole run: what is trained, on what, how, and where it goes."""

    model: Place
    """What to start from: a TADSR checkpoint (folder, hub id or "tadsr-tiny"), a Stable Diffusion
    2.1-base folder or hub id, or a YAML file of networks to build at random weights."""
    data: DataConfig | Place
    """Photographs; a string is a `DataConfig` with that source."""
    output: Place
    """Folder for checkpoints, log, pictures and the result; an interrupted run there continues."""
    stage: StageConfig = field(default_factory=DistillationConfig)
    """What is trained: the one-step student, or what a small model needs before it."""
    vae: Place | None = None
    """Checkpoint whose autoencoder takes the place of the model's; None keeps the model's."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer of the stage's main model."""
    steps: Count = 2000
    """Optimizer steps of the whole run, at least 1."""
    batch_size: Count = 1
    """Samples per process and forward pass, at least 1."""
    gradient_accumulation_steps: Count = 1
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
    ema_decay: Probability = 0.0
    """Decay of averaged weights, which are then validated and exported; in [0, 1), 0 is off."""
    seed: Natural = 0
    """Seed of crops, degradations, timesteps, noise and new weights, at least 0."""
    max_loss_ratio: Annotated[float, Within(1, is_open=True, may_be_infinite=True)] = 100.0
    """A loss above this many times its running mean stops the run, above 1."""
    log_every: Count = 10
    """Steps between log lines, at least 1."""
    save_every: Count = 500
    """Steps between checkpoints, at least 1."""
    keep_checkpoints: Count = 2
    """Checkpoints kept, the newest, at least 1."""
    export_precision: Precision = "fp32"
    """Type of the exported weights; adapters keep theirs."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where the log goes as well."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Fixed images to watch."""

    def __post_init__(self) -> None:
        check_fields(self)
        if isinstance(self.data, str):
            object.__setattr__(self, "data", DataConfig(self.data))
        if self.data.crop_px is None:
            crop_px = _SMALL_CROP_PX if self.model in EMBEDDED else DEFAULT_CROP_PX
            object.__setattr__(self, "data", replace(self.data, crop_px=crop_px))
        for name in ("restored_share", "perceptual_restored_share"):
            share = getattr(self.stage, name, None)
            if share is not None and not share.is_zero and self.data.restored is None:
                raise ValueError(
                    "data.restored must say where a restoration network's results are for a "
                    f"stage.{name} above 0, got None"
                )
        if self.ema_decay == 1:
            raise ValueError("ema_decay must be below 1, got 1")
