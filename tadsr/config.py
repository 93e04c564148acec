"""Settings of one restoration, checked when they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    import torch

    from tadsr.tile_spec import TileSpec

ColorFix = Literal["adain", "wavelet", "none"]
"""How the result's colours are brought back to the input's."""

Seamless = Literal["both", "x", "y"]
"""In which directions an image repeats: to the right (x), below (y), or both."""

EngineName = Literal["auto", "fused", "eager", "compile", "openvino"]
"""How the networks are run: see `tadsr.onestep`."""
Precision = Literal["fp32", "fp16", "bf16"]
"""What users call a type of weights."""

DTYPE_NAMES: dict[Precision, str] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Torch's names of them."""

MAX_PIXELS = 178_956_970
"""Largest input that is read unless asked: where Pillow itself refuses to open a file."""

PAPER_PROCESS_SIZE = 512
"""`process_size` of models that name none: the size that Stable Diffusion 2.1 is at home at."""

MAX_ENLARGED_ASPECT = 4
"""Enlarging to `process_size` stops at an area of this many process_size × process_size squares,
or a strip of a few pixels would become gigapixels."""

SEAMLESS_MARGIN_PX = 192
"""What is computed beyond each edge of a texture, where networks still see that there is one."""


@dataclass(frozen=True)
class TargetSize:
    """The size in px of every result, which keeps its aspect ratio."""

    width: int | None = None
    """With `height` as well, results fit into both."""
    height: int | None = None
    long_side: int | None = None
    short_side: int | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of px from 1, got {value!r}")
        if len(given) != 1 and set(given) != {"width", "height"}:
            raise ValueError(
                "a size must be width, height, both, long_side or short_side, got "
                f"{', '.join(given) or 'none'}"
            )

    def scale_of(self, height: int, width: int) -> float:
        """Return the scale that brings an input to this size."""
        sides = {
            "width": width,
            "height": height,
            "long_side": max(height, width),
            "short_side": min(height, width),
        }
        wanted = ((getattr(self, name), side) for name, side in sides.items())
        return min(value / side for value, side in wanted if value is not None)


@dataclass(frozen=True)
class UpscaleSettings:
    """What one call of the pipeline does to every image, apart from its timestep and prompt."""

    scale: float = 4.0
    """Output size over input size, a finite number ≥ 1; 1 restores at the given size."""
    color_fix: ColorFix | None = "adain"
    """"adain" (mean and spread per channel), "wavelet" (low band), or "none", which None
    becomes."""
    process_size: int | None = None
    """Images whose output has a shorter side below this many px are processed enlarged and
    shrunk back; 0 switches that off, None is the model's own."""
    tiling: TileSpec | Literal["auto"] | None = "auto"
    """Whether, and by what, large images are computed in pieces; None for never."""
    seamless: Seamless | None = None
    """In which directions images repeat and the results must, too; None for no texture."""

    def __post_init__(self) -> None:
        if isinstance(self.scale, bool) or not isinstance(self.scale, Real):
            raise TypeError(f"scale must be a number, got {type(self.scale).__name__}")
        if not math.isfinite(self.scale) or self.scale < 1:
            raise ValueError(
                f"scale must be a finite number of at least 1, got {self.scale}; "
                "to shrink an image use Pillow's resize"
            )
        if self.color_fix is None:
            object.__setattr__(self, "color_fix", "none")
        if self.color_fix not in get_args(ColorFix):
            raise ValueError(
                f"color_fix must be one of {', '.join(get_args(ColorFix))}, got {self.color_fix!r}"
            )
        if self.seamless not in (None, *get_args(Seamless)):
            raise ValueError(
                f"seamless must be one of {', '.join(get_args(Seamless))}, or None, got "
                f"{self.seamless!r}"
            )
        size = 0 if self.process_size is None else self.process_size
        is_whole = isinstance(size, int) and not isinstance(size, bool)
        if not is_whole or size < 0:
            raise (ValueError if is_whole else TypeError)(
                f"process_size must be a whole number of at least 0 px, got {self.process_size!r}; "
                "0 switches the minimum size off"
            )

    def of_model(self, process_size: int) -> UpscaleSettings:
        """Return these settings with a model's own `process_size` where they name none."""
        return self if self.process_size is not None else replace(self, process_size=process_size)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the output's height and width in px for an input's."""
        return round(self.scale * height), round(self.scale * width)

    @property
    def margins_px(self) -> tuple[int, int]:
        """What is computed above and below, and to the left and right, of an image that repeats."""
        across_y, across_x = self.wraps
        return SEAMLESS_MARGIN_PX * across_y, SEAMLESS_MARGIN_PX * across_x

    @property
    def wraps(self) -> tuple[bool, bool]:
        """Whether an image repeats below it, and to its right."""
        return self.seamless in ("both", "y"), self.seamless in ("both", "x")

    def network_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width in px, before padding, that the network works at."""
        out_height, out_width = self.output_size(height, width)
        shorter = PAPER_PROCESS_SIZE if self.process_size is None else self.process_size
        area_limit = MAX_ENLARGED_ASPECT * shorter**2
        factor = min(
            shorter / min(out_height, out_width),
            math.sqrt(area_limit / (out_height * out_width)),
        )
        if factor <= 1:
            return out_height, out_width
        return max(1, round(factor * out_height)), max(1, round(factor * out_width))


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's type for a name of `DTYPE_NAMES`."""
    import torch  # not at the top: settings are checked before anything heavy is loaded

    return getattr(torch, DTYPE_NAMES[name])
