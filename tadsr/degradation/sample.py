"""Draw the parameters of one degradation; nothing here touches pixels."""

from __future__ import annotations

import dataclasses
import math
import operator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from tadsr.degradation.presets import (
    KERNEL_KINDS,
    BlurConfig,
    DegradationConfig,
    KernelKind,
    StageConfig,
)

ResizeMode = Literal["area", "bilinear", "bicubic"]

Codec = Literal["jpeg", "webp"]

RESIZE_MODES: tuple[ResizeMode, ...] = get_args(ResizeMode)
SMALL_SINC_PX = 13
"""Sinc kernels smaller than this get a cut-off of at least π/3, others of at least π/5."""


@dataclass(frozen=True)
class KernelParams:
    """One blur kernel; see `apply.make_kernel`."""

    kind: KernelKind | Literal["sinc"]
    size: int
    """Side in px, odd."""
    sigma_x: float = 1.0
    """Standard deviation along x in px; unused by sinc."""
    sigma_y: float = 1.0
    """Standard deviation along y in px; unused by sinc."""
    theta: float = 0.0
    """Angle in radians; unused by sinc."""
    beta: float = 1.0
    """Shape of generalized and plateau kernels."""
    cutoff: float = math.pi
    """Cut-off of a sinc in radians per px."""


@dataclass(frozen=True)
class NoiseParams:
    """Noise of one stage: its distribution, its strength and what it is drawn by."""

    kind: Literal["gaussian", "poisson"]
    strength: float
    """σ of 255 for Gaussian noise, factor for Poisson noise."""
    is_gray: bool
    """Whether all channels share the noise."""
    seed: int
    """Seed of the noise itself."""


@dataclass(frozen=True)
class StageParams:
    """One order of the pipeline, drawn."""

    blur: KernelParams | None
    resize_factor: float
    """Factor on the stage's base size; see `apply_degradation`."""
    resize_mode: ResizeMode
    noise: NoiseParams
    jpeg_quality: float
    """Quality of the compression, 1..100."""
    codec: Codec = "jpeg"
    """What it is compressed by."""


@dataclass(frozen=True)
class DegradationParams:
    """A whole degradation, replayable and serialisable by `to_dict`."""

    scale: int
    """Reduction from HQ to LQ."""
    stages: tuple[StageParams, ...]
    final_mode: ResizeMode
    final_sinc: KernelParams | None
    jpeg_before_resize: bool
    """Whether the last stage's JPEG comes before the final resize and sinc, or after them."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that JSON can hold."""
        return dataclasses.asdict(self) | {"stages": [dataclasses.asdict(s) for s in self.stages]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DegradationParams:
        """Rebuild parameters from `to_dict`'s result."""

        def kernel(item: dict[str, Any] | None) -> KernelParams | None:
            return None if item is None else KernelParams(**item)

        stages = tuple(
            StageParams(**s | {"blur": kernel(s["blur"]), "noise": NoiseParams(**s["noise"])})
            for s in data["stages"]
        )
        return cls(**data | {"stages": stages, "final_sinc": kernel(data["final_sinc"])})


def sample_degradation(
    rng: np.random.Generator, config: DegradationConfig, *, scale: int = 4
) -> DegradationParams:
    """Draw one degradation.

    Args:
        rng: Source of randomness; the same state gives the same degradation.
        config: Ranges and probabilities, such as `PRESETS["realesrgan"]`.
        scale: Reduction from HQ to LQ, at least 1.

    Returns:
        Parameters for `apply_degradation`.

    Raises:
        TypeError: `scale` is not an integer.
        ValueError: `scale` is below 1.

    Source: Real-ESRGAN (arXiv 2107.10833), figure 2.
    """
    scale = operator.index(scale)  # a NumPy integer would not survive JSON
    if scale < 1:
        raise ValueError(f"scale must be at least 1, got {scale}")
    stages = tuple(_sample_stage(rng, stage) for stage in config.stages)
    final_sinc = None
    if rng.random() < config.final_sinc_probability:
        # The final filter's cut-off does not depend on its size, unlike a blur's.
        size = _odd_size(rng, config.final_sinc_size_px)
        final_sinc = KernelParams("sinc", size, cutoff=rng.uniform(math.pi / 3, math.pi))
    return DegradationParams(
        scale=scale,
        stages=stages,
        final_mode=_choice(rng, RESIZE_MODES),
        final_sinc=final_sinc,
        jpeg_before_resize=bool(rng.random() >= 0.5),
    )


def _sample_stage(rng: np.random.Generator, config: StageConfig) -> StageParams:
    blur = _sample_kernel(rng, config.blur) if rng.random() < config.blur.probability else None
    low, high = config.resize_factor
    direction = rng.choice(3, p=config.resize_weights)
    factor = (rng.uniform(1, high), rng.uniform(low, 1), 1.0)[direction]
    is_gaussian = rng.random() < config.gaussian_probability
    strength = config.gaussian_sigma if is_gaussian else config.poisson_scale
    webp_share = config.webp_probability
    return StageParams(
        blur=blur,
        resize_factor=float(factor),
        resize_mode=_choice(rng, RESIZE_MODES),
        noise=NoiseParams(
            kind="gaussian" if is_gaussian else "poisson",
            strength=float(rng.uniform(*strength)),
            is_gray=bool(rng.random() < config.gray_probability),
            seed=int(rng.integers(2**31)),
        ),
        jpeg_quality=float(rng.uniform(*config.jpeg_quality)),
        # Nothing is drawn without WebP, so that other presets' records stay those of their seeds.
        codec="webp" if webp_share > 0 and rng.random() < webp_share else "jpeg",
    )


def _sample_kernel(rng: np.random.Generator, config: BlurConfig) -> KernelParams:
    size = _odd_size(rng, config.size_px)
    if rng.random() < config.sinc_probability:
        lowest = math.pi / 3 if size < SMALL_SINC_PX else math.pi / 5
        return KernelParams("sinc", size, cutoff=float(rng.uniform(lowest, math.pi)))
    kind = _choice(rng, KERNEL_KINDS, config.kind_weights)
    sigma_x = float(rng.uniform(*config.sigma_px))
    if kind.endswith("aniso"):
        sigma_y, theta = float(rng.uniform(*config.sigma_px)), float(rng.uniform(-np.pi, np.pi))
    else:
        sigma_y, theta = sigma_x, 0.0
    shapes = {"generalized": config.beta_generalized, "plateau": config.beta_plateau}
    shape = shapes.get(kind.partition("_")[0])
    beta = 1.0 if shape is None else _around_one(rng, *shape)
    return KernelParams(kind, size, sigma_x, sigma_y, theta, beta)


def _around_one(rng: np.random.Generator, low: float, high: float) -> float:
    """Draw below or above 1 with equal probability where the range holds 1."""
    # A range that starts at 1 gives exactly 1 half of the time, as Real-ESRGAN's plateaus do.
    if low <= 1 <= high:
        return float(rng.uniform(low, 1) if rng.random() < 0.5 else rng.uniform(1, high))
    return float(rng.uniform(low, high))


def _odd_size(rng: np.random.Generator, size_px: tuple[int, int]) -> int:
    return int(rng.choice(np.arange(size_px[0], size_px[1] + 1, 2)))


def _choice(rng: np.random.Generator, options: tuple, weights: tuple | None = None):
    return options[rng.choice(len(options), p=weights)]
