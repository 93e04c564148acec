"""What each stage of training does, as data; the defaults are the paper's."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from tadsr.field_checks import (
    Limit,
    Natural,
    Place,
    Positive,
    Probability,
    Weight,
    Within,
    check_fields,
)
from tadsr.schedule import NUM_TRAIN_TIMESTEPS

_LAST = NUM_TRAIN_TIMESTEPS - 1
_Timesteps = Annotated[tuple[int, int], Within(0, _LAST, is_ordered=True)]
NEGATIVE_PROMPT = (
    "painting, oil painting, illustration, drawing, art, sketch, cartoon, CG style, 3D render, "
    "unreal engine, blurring, dirty, messy, worst quality, low quality, frames, watermark, "
    "signature, jpeg artifacts, deformed, lowres, over-smooth"
)
"""What the teacher is guided away from: styles and artefacts."""


@dataclass(frozen=True)
class TimestepRamp:
    """A weight that changes with the student's timestep, by default linearly."""

    start: Weight
    """Value at timestep 0, at least 0."""
    end: Weight
    """Value at the last timestep, at least 0."""
    exponent: Positive = 1.0
    """Power of the timestep that the change is proportional to, above 0: below 1 most of it happens
    at small timesteps."""

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def constant(cls, value: float) -> TimestepRamp:
        """Return the same weight at every timestep; a number in a ramp's place stands for it."""
        return cls(value, value)

    @property
    def largest(self) -> float:
        """The largest value, at one of the ends."""
        return max(self.start, self.end)

    @property
    def is_zero(self) -> bool:
        """Whether the weight is 0 everywhere."""
        return self.start == self.end == 0

    def at(self, timesteps):
        """Return the weight at timesteps (B,), as floats (B,)."""
        fraction = timesteps.float() / _LAST
        return self.start + (self.end - self.start) * fraction**self.exponent


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, or Muon and AdamW, with warm-up and an optional cosine decay."""

    learning_rate: Positive = 5e-5
    """Peak learning rate, > 0."""
    muon_learning_rate: Limit | None = None
    """Peak learning rate, > 0, of Muon, which then steps the kernels and matrices, so that AdamW
    has the biases, norms and embeddings; None has AdamW step all (published code)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's momentum terms, each in [0, 1)."""
    weight_decay: Weight = 1e-2
    """Decoupled weight decay, at least 0."""
    max_grad_norm: Limit = 1.0
    """Gradients are clipped to this L2 norm, > 0."""
    warmup_steps: Natural = 0
    """Steps of linear warm-up, at least 0 (published code: none)."""
    final_fraction: Probability = 1.0
    """Learning rate at the last step as a fraction of the peak, in [0, 1]; 1 keeps it constant."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")

    def factor_at(self, step: int, total_steps: int) -> float:
        """Return the learning rate at a step, from 0, as a fraction of the peak."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.final_fraction + (1 - self.final_fraction) * cosine


@dataclass(frozen=True)
class AutoencoderConfig:
    """Train a small autoencoder on sharp photographs, without time."""

    kind: Literal["autoencoder"] = "autoencoder"
    """Name of the stage in recipes."""
    perceptual: str = "auto"
    """Perceptual distance; see `make_perceptual`. "auto" is LPIPS, else DISTS, else none, whichever
    is installed. "none" needs `perceptual_weight` 0."""
    l1_weight: Weight = 1.0
    """Weight of the mean absolute error, at least 0."""
    perceptual_weight: Weight = 0.1
    """Weight of the perceptual distance, at least 0."""
    chroma_weight: Weight = 0.0
    """Weight of the colour differences' mean squared error, at least 0."""
    kl_weight: Weight = 1e-6
    """Weight of the posterior's KL divergence, summed per item, at least 0."""
    train_decoder: bool = True
    """Whether the decoder is trained. False fits the encoder to a decoder that a student already
    uses, and keeps its scale of latents, so that a teacher can be trained for that student."""

    def __post_init__(self) -> None:
        check_fields(self)
        _check_perceptual(self.perceptual, self.perceptual_weight > 0)


@dataclass(frozen=True)
class TeacherConfig:
    """Train a latent-diffusion teacher: noise prediction, conditioned on prompt embeddings."""

    kind: Literal["teacher"] = "teacher"
    """Name of the stage in recipes."""
    degraded_probability: Probability = 0.0
    """Probability that a sample shows the LQ image under `degraded_prompt`, in [0, 1), so that
    guidance away from that prompt means away from degradation."""
    degraded_prompt: str = "degraded photo"
    """Prompt of LQ samples."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.degraded_probability == 1:
            raise ValueError("degraded_probability must be below 1, got 1")


@dataclass(frozen=True)
class DistillationConfig:
    """Train TADSR's one-step student: time-aware encoder and UNet.

    Source: TADSR (arXiv 2508.16557), training.
    """

    kind: Literal["distillation"] = "distillation"
    """Name of the stage in recipes."""
    teacher: Place | None = None
    """Checkpoint whose UNet and prompts are the teacher's; None takes the base UNet of `model`."""
    adapter_rank: Natural | None = None
    """Rank of the student's LoRA, at least 0; 0 trains all weights of encoder and UNet. None takes
    that of the model's own adapters, or 4."""
    adapter_alpha: Positive | None = None
    """Numerator of the LoRA's scaling alpha / rank, above 0. None takes that of the model's own
    adapters, or twice the rank, as published."""
    fake_score_rank: Natural = 4
    """Rank of the fake-score model's LoRA on the teacher's UNet, at least 0; 0 trains a copy."""
    fake_score_alpha: Positive | None = None
    """Numerator of its scaling, above 0; None is twice its rank."""
    train_decoder: bool = False
    """Whether the decoder is trained as well; the method keeps it frozen."""
    tae: bool = True
    """Whether the encoder sees the timestep; False freezes its time layers at no effect."""
    timestep_grid: Natural = 0
    """0 draws t_s uniformly from `timestep_range`; a number n ≥ 2 from n evenly spaced integers of
    it (published code: 50 from 1 to 999)."""
    timestep_range: _Timesteps = (0, 999)
    """Smallest and largest t_s, within 0..999; equal for a student of one timestep."""

    mse_weight: TimestepRamp = TimestepRamp(1.0, 1.0)
    """Weight of the MSE by t_s."""
    blur: bool = True
    """Whether that MSE compares images blurred by the timestep's Gaussian, or plain ones."""
    plain_mse_weight: TimestepRamp = TimestepRamp(0.0, 0.0)
    """Weight of a further, never blurred MSE by t_s (method: 0)."""
    chroma_mse_weight: TimestepRamp = TimestepRamp(0.0, 0.0)
    """Weight of the colour differences' MSE by t_s (method: 0)."""
    l1_weight: TimestepRamp = TimestepRamp(0.0, 0.0)
    """Weight of the mean absolute error by t_s (method: 0)."""
    gradient_weight: TimestepRamp = TimestepRamp(0.0, 0.0)
    """Weight of the mean absolute error of neighbours' differences by t_s (method: 0)."""
    restored_share: TimestepRamp = TimestepRamp(0.0, 0.0)
    """How far by t_s the images that all errors above are taken from move away from the originals
    towards a restoration network's results (`data.restored`), but for their mean colours: 0 stays,
    1 arrives, and more goes on beyond, with more of what the network adds (method: 0)."""
    perceptual_restored_share: TimestepRamp = TimestepRamp(0.0, 0.0)
    """The same for the images that the perceptual distance looks at (method: 0)."""
    perceptual: str = "auto"
    """Perceptual distance; see `make_perceptual`. "auto" is LPIPS, else DISTS, else none, whichever
    is installed. "none" needs `perceptual_weight` 0."""
    perceptual_weight: TimestepRamp = TimestepRamp(2.0, 2.0)
    """Weight of the perceptual distance by t_s (published code: 2)."""
    perceptual_shift_px: Natural = 0
    """Each pair begins up to so many px further right and down where the perceptual distance is
    taken. Its networks look at every second pixel and fewer; a student whose grid of latents always
    meets theirs in the same way learns to draw that grid (method: 0)."""
    clamp_image: bool = False
    """Whether restored images are clamped to [-1, 1] before their losses (published code: yes)."""
    sample_posterior: bool = False
    """Whether the encoder's posterior is sampled (published code: yes) or its mean taken."""
    latent_steps: Natural = 0
    """First steps that match the HQ's latents instead of images, so that a UNet trained from
    scratch finds the scale of its output before the decoder sees it; 0 to skip."""

    tavsd_weight: TimestepRamp | None = None
    """Weight of variational score distillation by t_s; 0 at both ends leaves it and its models out.
    None is the method's 1 at every t_s, or 0 where there is no teacher."""
    vsd_timestep: Literal["linked", "uniform", "fixed"] = "linked"
    """How t_v comes about: "linked" ⌊λ·t_s + γ⌋ (TAVSD), "uniform" from `vsd_range` (the paper's
    baseline), "fixed" at `vsd_fixed`."""
    vsd_lambda: Weight = 0.5
    """λ of "linked", at least 0."""
    vsd_gamma: float = 0.0
    """γ of "linked", in timesteps."""
    vsd_range: _Timesteps = (20, 979)
    """Smallest and largest t_v of "uniform", within 0..999."""
    vsd_fixed: Annotated[int, Within(0, _LAST)] = 500
    """t_v of "fixed", 0..999."""
    guidance: Weight = 7.5
    """Classifier-free guidance of the teacher at t_v = 0, at least 0."""
    guidance_slope: float = 1 / 200
    """Guidance added per timestep of t_v; 0 for the paper's constant guidance."""
    negative_prompt: str = NEGATIVE_PROMPT
    """What the teacher is guided away from."""
    teacher_prompt: str | None = None
    """Prompt of teacher and fake score; None gives them the sample's own."""
    fake_score_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer of the fake-score model."""

    gan_weight: TimestepRamp = TimestepRamp(0.0, 0.0)
    """Weight of the adversarial loss by t_s (method: 0); the discriminator minds what it is used
    on in the same measure."""
    discriminator_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer of the discriminator."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("adapter", "fake_score"):
            if getattr(self, f"{name}_rank") == 0 and getattr(self, f"{name}_alpha") is not None:
                raise ValueError(
                    f"{name}_alpha must be left out without adapters ({name}_rank 0), "
                    f"got {getattr(self, f'{name}_alpha')}"
                )
        if self.timestep_grid == 1:
            raise ValueError("timestep_grid must be 0 or at least 2, got 1")
        _check_perceptual(self.perceptual, not self.perceptual_weight.is_zero)


StageConfig = DistillationConfig | TeacherConfig | AutoencoderConfig
"""Any of the three; the first is what a recipe means that names no kind."""


def _check_perceptual(name: str, is_used: bool) -> None:
    if name == "none" and is_used:
        raise ValueError(
            "perceptual must name a distance where perceptual_weight is above 0, got 'none'; set "
            "perceptual_weight to 0 to train without"
        )
