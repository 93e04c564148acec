"""Types of the pipeline's call, for type checkers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypedDict, TypeVar, overload

import numpy as np
from PIL import Image
from torch import Generator, Tensor

from tadsr.conditioning import TimestepLike
from tadsr.config import ColorFix, Seamless, UpscaleSettings
from tadsr.images import ArrayImage
from tadsr.onestep import TileSpec
from tadsr.progress import Progress

if TYPE_CHECKING:
    # A dependency of torch's; typing has it from Python 3.11 on.
    from typing_extensions import Unpack as Unpack

Picture = TypeVar("Picture", Image.Image, np.ndarray, Tensor, ArrayImage)
"""One image, or a batch of tensors, in the kind that the result has as well."""
Pixels: TypeAlias = Image.Image | np.ndarray | ArrayImage
"""One image."""


class CallOptions(TypedDict, total=False):
    """What a call takes beside image, timestep and the result's kind."""

    scale: float
    prompt: str | Sequence[str] | None
    color_fix: ColorFix | None
    process_size: int | None
    seamless: Seamless | None
    tiling: TileSpec | Literal["auto"] | None
    settings: UpscaleSettings | None
    generator: Generator | Sequence[Generator] | None
    progress: Progress | None


class Restore(Protocol):
    """A pipeline's call: what comes back is of the kind that came in, or of `output_type`."""

    @overload
    def __call__(
        self,
        image: Picture,
        timestep: TimestepLike | Sequence[TimestepLike] | None = ...,
        *,
        output_type: None = None,
        **options: Unpack[CallOptions],
    ) -> Picture: ...
    @overload
    def __call__(
        self,
        image: Sequence[Picture],
        timestep: TimestepLike | Sequence[TimestepLike] | None = ...,
        *,
        output_type: None = None,
        **options: Unpack[CallOptions],
    ) -> list[Picture]: ...
    @overload
    def __call__(
        self,
        image: Pixels,
        timestep: TimestepLike | Sequence[TimestepLike] | None = ...,
        *,
        output_type: Literal["pil"],
        **options: Unpack[CallOptions],
    ) -> Image.Image: ...
    @overload
    def __call__(
        self,
        image: Sequence[Pixels | Tensor],
        timestep: TimestepLike | Sequence[TimestepLike] | None = ...,
        *,
        output_type: Literal["pil"],
        **options: Unpack[CallOptions],
    ) -> list[Image.Image]: ...
    @overload
    def __call__(
        self,
        image: Pixels,
        timestep: TimestepLike | Sequence[TimestepLike] | None = ...,
        *,
        output_type: Literal["np"],
        **options: Unpack[CallOptions],
    ) -> np.ndarray: ...
    @overload
    def __call__(
        self,
        image: Sequence[Pixels | Tensor],
        timestep: TimestepLike | Sequence[TimestepLike] | None = ...,
        *,
        output_type: Literal["np"],
        **options: Unpack[CallOptions],
    ) -> list[np.ndarray]: ...
    @overload
    def __call__(
        self,
        image: Pixels | Tensor,
        timestep: TimestepLike | Sequence[TimestepLike] | None = ...,
        *,
        output_type: Literal["pt"],
        **options: Unpack[CallOptions],
    ) -> Tensor: ...
    @overload
    def __call__(
        self,
        image: Sequence[Pixels | Tensor],
        timestep: TimestepLike | Sequence[TimestepLike] | None = ...,
        *,
        output_type: Literal["pt"],
        **options: Unpack[CallOptions],
    ) -> list[Tensor]: ...
    @overload
    def __call__(
        self,
        image: Any,
        timestep: TimestepLike | Sequence[TimestepLike] | None = ...,
        *,
        output_type: str | None = None,
        return_dict: bool | None = None,
        **options: Unpack[CallOptions],
    ) -> Any: ...
