"""What a degradation may be: the ranges that parameters are drawn from, as data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Literal, get_args

from tadsr.field_checks import Probability, Within, check_fields

KernelKind = Literal[
    "iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso"
]
"""Families of blur kernels; the sinc kernel is drawn apart."""

KERNEL_KINDS: tuple[KernelKind, ...] = get_args(KernelKind)

Range = tuple[float, float]
"""Smallest and largest value, drawn uniformly."""
_Shape = Annotated[Range, Within(1e-3, 100, is_ordered=True)]


def _check_odd_sizes(name: str, value: tuple[int, int]) -> None:
    low, high = value
    if not (1 <= low <= high and low % 2 == 1 and high % 2 == 1):
        raise ValueError(f"{name} must be an ordered pair of odd numbers, got {value}")


@dataclass(frozen=True)
class BlurConfig:
    """How a blur kernel is drawn."""

    probability: Probability = 1.0
    """Probability of blurring at all, in [0, 1]."""
    sinc_probability: Probability = 0.1
    """Probability that the kernel is a sinc (ringing) instead of a Gaussian-like one."""
    kind_weights: tuple[float, ...] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    """Weight of each of `KERNEL_KINDS`; they sum to 1."""
    size_px: tuple[int, int] = (7, 21)
    """Smallest and largest kernel side in px, odd; drawn uniformly among the odd numbers."""
    sigma_px: _Shape = (0.2, 3.0)
    """Standard deviations in px, above 0."""
    beta_generalized: _Shape = (0.5, 4.0)
    """Shape of generalized Gaussians, above 0; 1 is a Gaussian."""
    beta_plateau: _Shape = (1.0, 2.0)
    """Shape of plateau kernels, above 0."""

    def __post_init__(self) -> None:
        check_fields(self)
        if len(self.kind_weights) != len(KERNEL_KINDS) or min(self.kind_weights) < 0:
            raise ValueError(
                f"kind_weights must be {len(KERNEL_KINDS)} weights of at least 0, "
                f"got {self.kind_weights}"
            )
        if not math.isclose(sum(self.kind_weights), 1):
            raise ValueError(f"kind_weights must sum to 1, got {sum(self.kind_weights)}")
        _check_odd_sizes("size_px", self.size_px)


@dataclass(frozen=True)
class StageConfig:
    """One order of the pipeline: blur, resize, noise and JPEG."""

    blur: BlurConfig
    resize_weights: tuple[float, float, float]
    """Probabilities of enlarging, shrinking and keeping the size; they sum to 1."""
    resize_factor: Range
    """Smallest factor when shrinking (≤ 1) and largest when enlarging (≥ 1)."""
    gaussian_probability: Probability
    """Probability of Gaussian noise; Poisson noise otherwise."""
    gaussian_sigma: Annotated[Range, Within(0, 255, is_ordered=True)]
    """Standard deviation of Gaussian noise, of 255."""
    poisson_scale: Annotated[Range, Within(0, 100, is_ordered=True)]
    """Factor on Poisson noise."""
    gray_probability: Probability
    """Probability that the noise is the same in all channels."""
    jpeg_quality: Annotated[Range, Within(1, 100, is_ordered=True)] = (30.0, 95.0)
    """Quality of the compression, in [1, 100]."""
    webp_probability: Probability = 0.0
    """Probability of WebP in JPEG's place, in [0, 1]."""

    def __post_init__(self) -> None:
        check_fields(self)
        weights = self.resize_weights
        if min(weights) < 0 or not math.isclose(sum(weights), 1):
            raise ValueError(
                f"resize_weights must be three probabilities summing to 1, "
                f"got {self.resize_weights}"
            )
        low, high = self.resize_factor
        if not 0 < low <= 1 <= high:
            raise ValueError(f"resize_factor must enclose 1, got {self.resize_factor}")


@dataclass(frozen=True)
class DegradationConfig:
    """A whole pipeline; without stages, LQ is the bicubic reduction of HQ.

    Source: Real-ESRGAN (arXiv 2107.10833), second-order degradation; the published TADSR code
    uses its default parameters.
    """

    stages: tuple[StageConfig, ...] = ()
    """Orders, at most two; the last one's JPEG comes with the final resize and sinc filter."""
    final_sinc_probability: Probability = 0.0
    """Probability of the sinc filter beside the final resize."""
    final_sinc_size_px: tuple[int, int] = (7, 21)
    """Smallest and largest side in px of the final sinc kernel, odd."""

    def __post_init__(self) -> None:
        if len(self.stages) > 2:
            raise ValueError(f"stages must be at most two, got {len(self.stages)}")
        check_fields(self)
        _check_odd_sizes("final_sinc_size_px", self.final_sinc_size_px)


_REALESRGAN = DegradationConfig(
    stages=(
        StageConfig(
            blur=BlurConfig(),
            resize_weights=(0.2, 0.7, 0.1),
            resize_factor=(0.15, 1.5),
            gaussian_probability=0.5,
            gaussian_sigma=(1.0, 30.0),
            poisson_scale=(0.05, 3.0),
            gray_probability=0.4,
        ),
        StageConfig(
            blur=BlurConfig(probability=0.8, sigma_px=(0.2, 1.5)),
            resize_weights=(0.3, 0.4, 0.3),
            resize_factor=(0.3, 1.2),
            gaussian_probability=0.5,
            gaussian_sigma=(1.0, 25.0),
            poisson_scale=(0.05, 2.5),
            gray_probability=0.4,
        ),
    ),
    final_sinc_probability=0.8,
)

_MILD = DegradationConfig(
    stages=(
        StageConfig(
            blur=BlurConfig(probability=0.8, sigma_px=(0.2, 1.2)),
            resize_weights=(0.1, 0.3, 0.6),
            resize_factor=(0.5, 1.2),
            gaussian_probability=0.5,
            gaussian_sigma=(0.0, 8.0),
            poisson_scale=(0.0, 0.8),
            gray_probability=0.4,
            jpeg_quality=(60.0, 98.0),
        ),
    ),
    final_sinc_probability=0.2,
)

_WEB = DegradationConfig(
    stages=(
        StageConfig(
            blur=BlurConfig(probability=0.3, sigma_px=(0.2, 1.2)),
            resize_weights=(0.1, 0.7, 0.2),
            resize_factor=(0.25, 1.2),
            gaussian_probability=0.5,
            gaussian_sigma=(0.0, 6.0),
            poisson_scale=(0.0, 0.6),
            gray_probability=0.4,
            webp_probability=0.25,
        ),
        StageConfig(
            blur=BlurConfig(probability=0.1, sigma_px=(0.2, 0.8)),
            resize_weights=(0.3, 0.3, 0.4),
            resize_factor=(0.5, 2.0),
            gaussian_probability=1.0,
            gaussian_sigma=(0.0, 2.0),
            poisson_scale=(0.0, 0.0),
            gray_probability=0.4,
            webp_probability=0.25,
        ),
    ),
    final_sinc_probability=0.2,
)

PRESETS: Mapping[str, DegradationConfig] = MappingProxyType(
    {"realesrgan": _REALESRGAN, "web": _WEB, "mild": _MILD, "bicubic": DegradationConfig()}
)
"""Named pipelines: Real-ESRGAN's; pictures saved, scaled and saved again, as they go round the
web, with little noise; a light one for good cameras; and plain reduction."""


def find_preset(degradation: str | DegradationConfig) -> DegradationConfig:
    """Return a pipeline as it is, or a preset by its name.

    Raises:
        ValueError: There is no preset of that name.
    """
    if isinstance(degradation, DegradationConfig):
        return degradation
    if degradation not in [*PRESETS]:  # a list cannot be looked up
        raise ValueError(
            f"degradation must be ranges or one of {', '.join(PRESETS)}, got {degradation!r}"
        )
    return PRESETS[degradation]
