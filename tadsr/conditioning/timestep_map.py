"""The knob as a map: from images, arrays and regions, and at any resolution."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tadsr.images.metadata import turn_upright

MAX_GAP = 250
"""Knots are at most this far apart where a map has timesteps between them."""
MIN_SHARE_BETWEEN = 0.01
"""Less of the area than this between two knots is mixed of them, however far apart they are."""
MIN_SHARE = 0.05
"""Timesteps between a map's ends that hold so much of the area get knots of their own."""
MAX_LEVELS = 8
"""At most so many timesteps get knots of their own."""
_GRAY_MODES = {"1": 255, "L": 255, "I;16": 65535, "I;16L": 65535, "I;16B": 65535, "I": 65535}
"""Modes of PIL that can be a map, and their white."""
_COLOR_MODES = ("RGB", "RGBA", "LA", "P", "PA")
"""Modes of PIL that hold grey where all colours are equal."""
_ARRAY_WHITE = {np.dtype(bool): 1, np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}
"""Of other integers there is no white; that of floats is 1."""


TimestepLike: TypeAlias = (
    "int | TimestepMap | Image.Image | np.ndarray | Tensor | Mapping[str, Any]"
)
"""What a user may give as the timestep of an image."""


@dataclass(frozen=True, eq=False)
class TimestepMap:
    """The timestep of each place in an image, at any resolution."""

    values: Tensor
    """(h, w), float32, in 0..999; spread over the whole image, whatever its size."""
    named: tuple[float, ...] = ()
    """Timesteps that get a knot of their own wherever they occur, however small the place."""

    def __post_init__(self) -> None:
        values = self.values
        if not isinstance(values, Tensor) or values.dtype != torch.float32:
            found = values.dtype if isinstance(values, Tensor) else type(values).__name__
            raise TypeError(f"values of a timestep map must be a float32 tensor, got {found}")
        if values.ndim != 2 or not values.numel():
            raise ValueError(
                "values of a timestep map must have the shape (height, width), no side 0, got "
                f"{tuple(values.shape)}"
            )
        # NaN is not at least 0 either.
        if not (values >= 0).all() or values.isinf().any():
            raise ValueError("values of a timestep map must be finite and at least 0")

    @classmethod
    def constant(cls, timestep: float) -> TimestepMap:
        """Return the map that is one timestep everywhere."""
        return cls(torch.full((1, 1), float(timestep)))

    @classmethod
    def from_image(
        cls,
        image: Image.Image | np.ndarray | Tensor,
        timestep_range: tuple[float, float] | None = None,
    ) -> TimestepMap:
        """Read a map from a grey image or an array.

        Args:
            image: Grey PIL image (mode L, I, I;16 or 1), turned by its EXIF orientation, or numbers
                (H, W) or (H, W, 1).
            timestep_range: Timesteps of black and of white, which the values between are spread
                over; white is 255 at 8 bits, 65535 at 16, 1 in float arrays. None takes the
                values themselves as timesteps.

        Raises:
            TypeError: It is no image and no array of numbers.
            ValueError: It has colours or another shape, a value is below 0 or not finite, or an
                image is beyond its white where there is a range.
        """
        values, white = _gray_values(image)
        if timestep_range is not None:
            black, brightest = _numbers("timestep_range", timestep_range, 2)
            if white is None:
                raise TypeError(
                    "an array that is spread over a timestep_range must be bool, uint8, uint16 or "
                    "float; without a range its values are timesteps"
                )
            if not ((values >= 0) & (values <= white)).all():
                raise ValueError(
                    f"an array that is spread over a timestep_range must be in 0..{white}; "
                    "without a range its values are timesteps"
                )
            values = black + values * ((brightest - black) / white)
        return cls(torch.from_numpy(values.astype(np.float32)))

    @classmethod
    def from_regions(cls, regions: Mapping[str, Any], size: tuple[int, int]) -> TimestepMap:
        """Draw a map of boxes.

        Args:
            regions: `{"default": timestep, "regions": [{"box": [x0, y0, x1, y1], "timestep":
                timestep, "feather": px}]}`; boxes in px of the input image, later ones over
                earlier ones; outside its box a region fades out over `feather` px (default 0).
            size: Height and width of the input image in px.

        Raises:
            TypeError: Something is not of the wanted type.
            ValueError: A key is missing or unknown, or a box is empty or outside the image.
        """
        default, boxes = _read_regions(regions)
        height, width = size
        values = torch.full(size, default)
        y = torch.arange(height)[:, None] + 0.5
        x = torch.arange(width) + 0.5
        for number, ((left, top, right, bottom), timestep, feather) in enumerate(boxes):
            if right > width or bottom > height:
                raise ValueError(
                    f"regions[{number}] box must lie inside the input's {width}×{height} px, got "
                    f"{[left, top, right, bottom]}"
                )
            dx = torch.maximum(left - x, x - right).clamp(min=0)
            dy = torch.maximum(top - y, y - bottom).clamp(min=0)
            distance = torch.hypot(*torch.broadcast_tensors(dx, dy))
            share = 1 - distance / feather if feather else (distance == 0).float()
            values = torch.lerp(values, torch.tensor(timestep), share.clamp(0, 1))
        return cls(values, named=(default, *(timestep for _, timestep, _ in boxes)))

    @cached_property
    def knots(self) -> tuple[int, ...]:
        """Whole timesteps, rising, that the networks run at; results between them are mixed.

        The lowest and the highest, those that are named, those that hold 5 % of the area, and
        others where the map has timesteps in between that are more than 250 away from the next.
        """
        levels, counts = self.values.round().unique(return_counts=True)
        share = counts / counts.sum()
        by_area = [int(levels[i]) for i in share.argsort(descending=True)]
        named = {round(timestep) for timestep in self.named}
        num_large = int((share >= MIN_SHARE).sum())
        wanted = [
            *(int(levels[0]), int(levels[-1])),
            *(level for level in by_area if level in named),
            *by_area[:num_large],
        ]
        knots = sorted(list(dict.fromkeys(wanted))[:MAX_LEVELS])
        for low, high in list(pairwise(knots)):
            between = share[(levels > low) & (levels < high)].sum()
            if high - low > MAX_GAP and between >= MIN_SHARE_BETWEEN:
                steps = math.ceil((high - low) / MAX_GAP)
                knots += [low + (high - low) * step // steps for step in range(1, steps)]
        return tuple(sorted(knots))

    def at(self, height: int, width: int, rows: tuple[int, int] | None = None) -> Tensor:
        """Return the map at a resolution.

        Enlarged linearly; shrunk by a triangle over all values that a position covers, as
        Pillow's bilinear filter does.

        Args:
            height: Number of rows.
            width: Number of columns.
            rows: First row that is wanted, and the one after the last; None for all.

        Returns:
            (rows, width), float32.
        """
        start, stop = rows or (0, height)
        return _resample(_resample(self.values, 0, height, start, stop), 1, width, 0, width)

    def weights(self, height: int, width: int, rows: tuple[int, int] | None = None) -> Tensor:
        """Return the weight of each knot's result at each position.

        What is not listed here is as for `at`.

        Returns:
            (knots, rows, width), float32, in [0, 1]; 1 in sum.
        """
        values = self.at(height, width, rows)
        knots = torch.tensor(self.knots, dtype=torch.float32)
        values = values.clamp(knots[0], knots[-1])
        upper = torch.searchsorted(knots, values.contiguous()).clamp(1, max(1, len(knots) - 1))
        if len(knots) == 1:
            return torch.ones_like(values)[None]
        low, high = knots[upper - 1], knots[upper]
        share = (values - low) / (high - low)
        weights = torch.zeros(len(knots), *values.shape)
        weights.scatter_(0, upper[None] - 1, (1 - share)[None])
        return weights.scatter_(0, upper[None], share[None])


def largest_timestep(timestep: TimestepMap | Mapping[str, Any]) -> float:
    """Return the largest timestep of a map, or of regions, which are checked on the way."""
    if isinstance(timestep, TimestepMap):
        return float(timestep.values.max())
    default, boxes = _read_regions(timestep)
    return max([default, *(value for _, value, _ in boxes)])


def _gray_values(image: Any) -> tuple[np.ndarray, float | None]:
    """Return values (H, W), float64, and the value of white, or None if it is unknown."""
    if isinstance(image, Image.Image):
        image = _as_gray(image)
        white = _GRAY_MODES[image.mode]
        values = np.asarray(image.convert("L") if image.mode == "1" else image)
    else:
        values = image.detach().cpu().numpy() if isinstance(image, Tensor) else image
        if not isinstance(values, np.ndarray) or values.dtype.kind not in "buif":
            found = getattr(values, "dtype", type(values).__name__)
            raise TypeError(f"a timestep map must be a grey image or array of numbers, got {found}")
        white = 1 if values.dtype.kind == "f" else _ARRAY_WHITE.get(values.dtype)
        if values.ndim == 3 and values.shape[2] == 1:
            values = values[..., 0]
    if values.ndim != 2:
        raise ValueError(f"a timestep map must have the shape (H, W), got {values.shape}")
    return values.astype(np.float64), white


def _as_gray(image: Image.Image) -> Image.Image:
    """Return an upright grey image in a mode that can be a map; many save grey as colours."""
    image = turn_upright(image)
    if image.mode in _GRAY_MODES:
        return image
    if image.mode in _COLOR_MODES:
        *colors, alpha = image.convert("RGBA").split()
        if alpha.getextrema() == (255, 255) and colors[0] == colors[1] == colors[2]:
            return colors[0]
    raise ValueError(
        "a timestep map must be a grey image (mode L or I) without transparency, got mode "
        f'{image.mode}; save it in grey, or turn it with image.convert("L")'
    )


def _resample(values: Tensor, dim: int, length: int, start: int, stop: int) -> Tensor:
    """Resize a side of (h, w) to a length, and return a part of that."""
    side = values.shape[dim]
    ratio = side / length
    centers = (torch.arange(start, stop, dtype=torch.float64) + 0.5) * ratio
    stretch = max(1.0, ratio)
    reach = math.ceil(stretch)
    index = centers.floor().long()[:, None] + torch.arange(-reach, reach + 1)  # [part, taps]
    weights = (1 - (index + 0.5 - centers[:, None]).abs() / stretch).clamp(min=0)
    weights = weights * ((index >= 0) & (index < side))
    weights = (weights / weights.sum(1, keepdim=True)).float()
    index = index.clamp(0, side - 1)
    shape = (-1, 1) if dim == 0 else (1, -1)
    # Tap by tap: all at once would be as many copies.
    return sum(
        values.index_select(dim, index[:, tap]) * weights[:, tap].view(shape)
        for tap in range(index.shape[1])
    )


def _read_regions(regions: Any) -> tuple[float, list[tuple[tuple[float, ...], float, float]]]:
    """Return the default, and of each region its box, timestep and feather."""
    _check_keys("a timestep map of regions", regions, {"default"}, {"regions"})
    boxes = []
    for number, region in enumerate(_sequence("regions", regions.get("regions", []))):
        name = f"regions[{number}]"
        _check_keys(name, region, {"box", "timestep"}, {"feather"})
        left, top, right, bottom = box = _numbers(f"{name} box", region["box"], 4)
        if not (left < right and top < bottom):
            raise ValueError(
                f"{name} box must be [x0, y0, x1, y1] with x0 < x1 and y0 < y1, got {list(box)}"
            )
        timestep = _number(f"{name} timestep", region["timestep"])
        boxes.append((box, timestep, _number(f"{name} feather", region.get("feather", 0))))
    return _number("default", regions["default"]), boxes


def _check_keys(name: str, value: Any, required: set[str], optional: set[str]) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping, got {type(value).__name__}")
    if missing := required - value.keys():
        raise ValueError(f"{name} must have {', '.join(sorted(missing))}, got {sorted(value)}")
    if unknown := value.keys() - required - optional:
        known = ", ".join(sorted(required | optional))
        raise ValueError(f"{name} must have no keys but {known}, got {sorted(unknown)}")


def _sequence(name: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise TypeError(f"{name} must be a list, got {type(value).__name__}")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and at least 0, got {value}")
    return float(value)


def _numbers(name: str, values: Any, count: int) -> tuple[float, ...]:
    if len(_sequence(name, values)) != count:
        raise ValueError(f"{name} must be {count} numbers, got {len(values)}")
    return tuple(_number(name, value) for value in values)
