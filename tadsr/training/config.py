"""What a training run is: frozen, checked at construction, serialisable as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

from tadsr.schedule import NUM_TRAIN_TIMESTEPS


@dataclass(frozen=True)
class TimestepRamp:
    """A weight that changes linearly with the student's timestep."""

    start: float
    """Value at timestep 0, at least 0."""
    end: float
    """Value at the last timestep, at least 0."""

    def __post_init__(self) -> None:
        if self.start < 0 or self.end < 0:
            raise ValueError(f"weights must be at least 0, got {self.start} and {self.end}")

    def at(self, timesteps):
        """Return the weight at timesteps (B,), as floats (B,)."""
        fraction = timesteps.float() / (NUM_TRAIN_TIMESTEPS - 1)
        return self.start + (self.end - self.start) * fraction


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up and cosine decay."""

    learning_rate: float = 5e-5
    """Peak learning rate, > 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's momentum terms, each in [0, 1)."""
    weight_decay: float = 1e-2
    """Decoupled weight decay, at least 0."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this L2 norm, > 0."""
    warmup_steps: int = 500
    """Steps of linear warm-up, at least 0."""
    final_fraction: float = 1.0
    """Learning rate at the last step as a fraction of the peak, in [0, 1]; 1 keeps it constant."""

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or self.max_grad_norm <= 0:
            raise ValueError(
                "learning_rate and max_grad_norm must be above 0, got "
                f"{self.learning_rate} and {self.max_grad_norm}"
            )
        if not 0 <= self.final_fraction <= 1:
            raise ValueError(f"final_fraction must be in [0, 1], got {self.final_fraction}")
        if self.warmup_steps < 0 or self.weight_decay < 0:
            raise ValueError(
                "warmup_steps and weight_decay must be at least 0, got "
                f"{self.warmup_steps} and {self.weight_decay}"
            )


@dataclass(frozen=True)
class DataConfig:
    """Photographs to crop, and how their low-quality partners are made."""

    folder: str
    """Folder of high-quality photographs, searched recursively."""
    crop_px: int = 512
    """Side of the square HQ crop in px, a multiple of 8."""
    scale: int = 4
    """Down-sampling from HQ to LQ, at least 1."""
    min_zoom: float = 0.5
    """Crops are taken from the photo shrunk by a random factor in [min_zoom, 1], which gives
    new sharp detail; in (0, 1]."""
    degradation: str = "realesrgan"
    """Name of a preset of `tadsr.training.degradation`."""
    num_workers: int = 1
    """Processes that prepare crops beside the training process, at least 0."""

    def __post_init__(self) -> None:
        if self.crop_px < 8 or self.crop_px % 8:
            raise ValueError(f"crop_px must be a positive multiple of 8, got {self.crop_px}")
        if not 0 < self.min_zoom <= 1:
            raise ValueError(f"min_zoom must be in (0, 1], got {self.min_zoom}")
        if self.scale < 1 or self.num_workers < 0:
            raise ValueError(
                "scale must be at least 1 and num_workers at least 0, got "
                f"{self.scale} and {self.num_workers}"
            )


@dataclass(frozen=True)
class RunConfig:
    """How long a stage runs, where it writes and on what."""

    output: str
    """Folder for checkpoints and the log; an interrupted run there is continued."""
    total_steps: int
    """Optimizer steps of the whole stage, at least 1."""
    batch_size: int
    """Crops per step, at least 1."""
    seed: int = 0
    """Seed of crops, degradations and timesteps."""
    device: str = "cpu"
    """Torch device."""
    precision: str = "fp32"
    """"fp32", or "bf16" for autocast."""
    ema_decay: float = 0.999
    """Decay of the averaged weights that are saved as the result, in [0, 1); 0 keeps the last."""
    log_every: int = 50
    """Steps between log lines, at least 1."""
    save_every: int = 500
    """Steps between checkpoints, at least 1."""

    def __post_init__(self) -> None:
        if min(self.total_steps, self.batch_size, self.log_every, self.save_every) < 1:
            raise ValueError(
                "total_steps, batch_size, log_every and save_every must be at least 1, got "
                f"{self.total_steps}, {self.batch_size}, {self.log_every}, {self.save_every}"
            )
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be 'fp32' or 'bf16', got {self.precision!r}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")


@dataclass(frozen=True)
class AutoencoderConfig:
    """First stage: train a small autoencoder on sharp photographs."""

    run: RunConfig
    """Length, place and device."""
    data: DataConfig
    """Photographs; only the HQ crops are used."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer of encoder and decoder."""
    l1_weight: float = 1.0
    """Weight of the mean absolute error, at least 0."""
    perceptual_weight: float = 0.1
    """Weight of the perceptual distance, at least 0."""
    chroma_weight: float = 0.0
    """Weight of the colour differences' mean squared error, at least 0."""
    kl_weight: float = 1e-6
    """Weight of the posterior's KL divergence, summed per item, at least 0."""

    def __post_init__(self) -> None:
        weights = (self.l1_weight, self.perceptual_weight, self.chroma_weight, self.kl_weight)
        if min(weights) < 0:
            raise ValueError(
                "l1_weight, perceptual_weight, chroma_weight and kl_weight must be at least 0, "
                f"got {weights}"
            )


@dataclass(frozen=True)
class StudentConfig:
    """Second stage: time-aware encoder and one-step UNet, decoder frozen."""

    run: RunConfig
    """Length, place and device."""
    data: DataConfig
    """Photographs and their degradation."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer of the encoder and the UNet."""
    latent_steps: int = 0
    """First steps that match latents instead of images, so that a UNet trained from scratch
    finds the scale of its output before the decoder sees it; 0 to skip."""
    blurred_mse_weight: TimestepRamp = TimestepRamp(1.0, 1.0)
    """Weight of the blurred MSE by timestep (method: 1)."""
    mse_weight: TimestepRamp = TimestepRamp(0.0, 0.0)
    """Weight of the plain MSE by timestep (method: 0)."""
    perceptual_weight: TimestepRamp = TimestepRamp(2.0, 2.0)
    """Weight of the perceptual distance by timestep (method: 2, with LPIPS)."""
    chroma_mse_weight: TimestepRamp = TimestepRamp(0.0, 0.0)
    """Weight of the colour differences' MSE by timestep (method: 0)."""
    train_decoder: bool = False
    """Whether the decoder is trained as well; the method keeps it frozen."""

    def __post_init__(self) -> None:
        if self.latent_steps < 0:
            raise ValueError(f"latent_steps must be at least 0, got {self.latent_steps}")
