"""Types of the pipeline's call, for type checkers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypedDict, TypeVar

import numpy as np
from PIL import Image
from torch import Generator, Tensor

from tadsr.config import ColorFix, Seamless, UpscaleSettings
from tadsr.images import ArrayImage
from tadsr.onestep import TileSpec
from tadsr.progress import Progress

if TYPE_CHECKING:
    # A dependency of torch's; typing has it from Python 3.11 on.
    from typing_extensions import Unpack as Unpack

Picture = TypeVar("Picture", Image.Image, np.ndarray, Tensor, ArrayImage)
"""One image, or a batch of tensors, in the kind that the result has as well."""


class CallOptions(TypedDict, total=False):
    """What a call takes beside image, timestep and the result's kind."""

    scale: float
    prompt: str | Sequence[str] | None
    color_fix: ColorFix | None
    process_size: int
    seamless: Seamless | None
    tiling: TileSpec | Literal["auto"] | None
    settings: UpscaleSettings | None
    generator: Generator | Sequence[Generator] | None
    progress: Progress | None
