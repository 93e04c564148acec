"""What a training run is: frozen, checked at construction, serialisable as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from tadsr.checkpoints.detect import EMBEDDED
from tadsr.config import Precision
from tadsr.degradation import DegradationConfig, find_preset
from tadsr.field_checks import Count, Natural, Place, Probability, Within, check_fields
from tadsr.training.stages.stage_config import DistillationConfig, OptimizerConfig, StageConfig

Kind = Literal["auto", "folder", "pairs", "list", "huggingface", "webdataset"]
"""What a source is; "auto" tells by its name."""

DEFAULT_CROP_PX = 512
"""What Stable Diffusion 2.1-base was trained on."""
_PRESET_SHARES = ("bicubic_probability", "mild_probability", "web_probability")


@dataclass(frozen=True)
class RestoredConfig:
    """A finite set of samples that carry what a restoration network makes of their LQ."""

    folder: Place
    """Folder where they are kept, computed once; an interrupted computation goes on."""
    num_samples: Count = 20000
    """How many there are, at least 1. With more of them, those that are kept stay the same."""
    network: Place | None = None
    """Checkpoint of the network, of any architecture that spandrel detects; None takes the callable
    that `Trainer` is given, or needs all samples to be there."""
    seed: Natural = 0
    """Seed of crops and degradations, at least 0; the run's seed draws their order and turns."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class DataConfig:
    """Photographs, and how their low-quality partners are made."""

    source: Place
    """Folder of HQ photographs (searched recursively), list file (*.txt), data set id
    "owner/name" on the hub, or WebDataset shards (*.tar, braces allowed)."""
    kind: Kind = "auto"
    """What the source is."""
    lq: Place | None = None
    """Folder of LQ partners with the same relative names, at 1/scale or at the HQ's size; None
    degrades on the fly."""
    lq_resize: Literal["bicubic", "lanczos"] = "bicubic"
    """How stored LQ partners at 1/scale are enlarged (published code: lanczos)."""
    crop_px: int | None = None
    """Side of the square HQ crop in px, a multiple of 8 and of `scale`; None is 512, or 128 for a
    model inside the package."""
    scale: Count = 4
    """Down-sampling from HQ to LQ, at least 1."""
    min_zoom: Annotated[float, Within(0, 1, is_open=True)] = 1.0
    """Crops are taken from the photo resized by a random factor in [min_zoom, max_zoom]; below 1 it
    is shrunk, which gives new sharp detail; in (0, 1]."""
    max_zoom: Annotated[float, Within(1)] = 1.0
    """Above 1 it is enlarged too, and as soft as a camera's pictures are at their full size; at
    least 1."""
    flip: bool = True
    """Whether crops are mirrored at random."""
    rotate: bool = False
    """Whether crops are turned by multiples of 90° at random."""
    degradation: str | DegradationConfig = "realesrgan"
    """Name of a preset of `tadsr.degradation`, or ranges of your own; in a recipe a mapping, which
    may start from a preset (`preset: mild`)."""
    bicubic_probability: Probability = 0.01
    """Probability of plain bicubic reduction in its place, in [0, 1] (published code: 1 %)."""
    mild_probability: Probability = 0.0
    """Probability of the preset "mild" in its place, in [0, 1]."""
    web_probability: Probability = 0.0
    """Probability of the preset "web" in its place, in [0, 1]; the three at most 1 together."""
    degrade_on: Literal["worker", "device"] = "worker"
    """Where degradation is computed: in the worker processes, or by `Batch.to` on its device."""
    prompt: str = ""
    """Prompt of every sample that has no caption."""
    captions: Place | None = None
    """None for none; "sidecar" for a .txt beside each photo; a file of `tadsr tag` (*.jsonl); or
    one of lines "relative name<TAB>caption". Lists and streams carry their own captions."""
    prompt_dropout: Probability = 0.0
    """Probability of an empty prompt, in [0, 1]."""
    split: str = "train"
    """Part of a data set on the hub."""
    image_column: str = "image"
    """Column of a data set on the hub that holds images."""
    caption_column: str | None = None
    """Column of a data set on the hub, or suffix in shards, that holds captions."""
    shuffle_buffer: Count = 1000
    """Samples that a stream is shuffled over, at least 1."""
    cache_photos: bool = False
    """Keep decoded photos in memory, for sets of a few hundred."""
    num_workers: Natural = 2
    """Processes that prepare samples beside the training process, at least 0."""
    restored: RestoredConfig | None = None
    """Draw from a finite set of samples with a restoration network's results, flipped and turned at
    random each time; None makes every sample anew, without such results."""

    def __post_init__(self) -> None:
        check_fields(self)
        crop_px = DEFAULT_CROP_PX if self.crop_px is None else self.crop_px
        if crop_px < 8 or crop_px % 8 or crop_px % self.scale:
            raise ValueError(
                f"crop_px must be a positive multiple of 8 and of the scale {self.scale}, "
                f"got {self.crop_px}"
            )
        shares = [getattr(self, name) for name in _PRESET_SHARES]
        if sum(shares) > 1:
            names = ", ".join(_PRESET_SHARES)
            raise ValueError(f"{names} must be at most 1 together, got {shares}")
        find_preset(self.degradation)


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
