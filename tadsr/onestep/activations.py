"""Activations that are read and written in bands of rows, and their statistics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tadsr.kernels import group_norm_silu, row_moments
from tadsr.onestep.support import weights_in_place

_LEAST_WEIGHT = 1e-6
"""Of a band in which nothing can be seen, for its mean to be a number."""


class ChannelStatistics:
    """Mean and sum of squared deviations of each channel, merged without loss.

    Beside a CPU those of rows are kept, and merged at once when they are asked for: a launch a
    band in place of ten.

    Args:
        uses_kernels: Whether a GPU's kernels measure and normalise.

    Source: Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm (1979).
    """

    def __init__(
        self, batch: int, channels: int, device: torch.device, *, uses_kernels: bool = False
    ) -> None:
        self.uses_kernels = uses_kernels
        self.count: int | Tensor = 0
        self._mean = torch.zeros(batch, channels, dtype=widest_dtype(device), device=device)
        self._deviation = torch.zeros_like(self._mean)
        self._rows: list[Tensor] = []
        self._width = 0

    @classmethod
    def joined(cls, parts: Sequence[ChannelStatistics]) -> ChannelStatistics:
        """Return the statistics of activations side by side in their channels."""
        first = parts[0]
        result = cls(0, 0, first.mean.device, uses_kernels=first.uses_kernels)
        result._mean = torch.cat([part.mean for part in parts], dim=1)
        result._deviation = torch.cat([part._deviation for part in parts], dim=1)
        result.count = first.count
        return result

    @property
    def mean(self) -> Tensor:
        """Mean per channel, (B, C), float64."""
        self._gather()
        return self._mean

    def add(self, values: Tensor, weights: Tensor | None = None) -> None:
        """Take in further positions, (B, C, h, w), that may count for less than 1, (B, 1, h, w)."""
        if weights is not None:
            dtype = self._mean.dtype
            count = weights.sum((2, 3), dtype=dtype).clamp(min=_LEAST_WEIGHT)  # [B, 1]
            mean = (values * weights).sum((2, 3), dtype=dtype) / count
            spread = (values - mean[..., None, None].float()).square() * weights
            self._merge(count, mean, spread.sum((2, 3), dtype=dtype))
        elif values.device.type == "cpu":
            self._merge(values.shape[2] * values.shape[3], *_moments(values.float()))
        else:
            backend = None if self.uses_kernels else "reference"
            self._rows.append(row_moments(values, backend=backend))
            self._width = values.shape[3]

    def _gather(self) -> None:
        if self._rows:
            means, deviations = torch.cat(self._rows, dim=2).to(self._mean.dtype)  # [B, H, C]
            self._rows.clear()
            mean = means.mean(dim=1)
            between = (means - mean[:, None]).square_().sum(dim=1)
            deviation = deviations.sum(dim=1) + self._width * between
            self._merge(self._width * means.shape[1], mean, deviation)

    def _merge(self, count: int | Tensor, mean: Tensor, deviation: Tensor) -> None:
        if isinstance(self.count, int) and not self.count:
            self.count, self._mean, self._deviation = count, mean, deviation
            return
        total = self.count + count
        difference = mean - self._mean
        self._mean = self._mean + difference * (count / total)
        self._deviation += deviation + difference**2 * (self.count * count / total)
        self.count = total

    def variance(self, *, correction: int = 0) -> Tensor:
        """Return the variance per channel, (B, C), float64."""
        self._gather()
        count = self.count - correction
        return self._deviation / (
            count.clamp(min=1) if isinstance(count, Tensor) else max(1, count)
        )

    def norm(
        self, layer: nn.GroupNorm, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Callable[[Tensor, bool], Tensor]:
        """Return a GroupNorm of the whole image, as a function of some of its rows.

        Args:
            scale: Time's scale, (B, C): the result is times 1 + scale.
            shift: Time's shift, (B, C), added after.

        Returns:
            From rows (B, C, rows, W), and whether SiLU follows, to new rows:
            norm(x)·(1 + scale) + shift.
        """
        means = self.mean.unflatten(1, (layer.num_groups, -1))
        mean = means.mean(dim=2, keepdim=True)
        variance = self.variance().view_as(means) + (means - mean).square()
        variance = variance.mean(dim=2, keepdim=True)
        weight, bias = torch.ones_like(self.mean), torch.zeros_like(self.mean)
        if layer.affine:
            with weights_in_place(layer):
                weight, bias = weight * layer.weight.detach(), bias + layer.bias.detach()
        if scale is not None:
            weight, bias = weight * (1 + scale), bias * (1 + scale)
        if shift is not None:
            bias = bias + shift
        if self.uses_kernels:
            statistics = torch.cat([mean, variance], dim=2).float()
            weight, bias = weight.float(), bias.float()
            return lambda rows, silu: group_norm_silu(
                rows, layer.num_groups, weight, bias, layer.eps, silu=silu, statistics=statistics
            )
        factor = (weight.view_as(means) * (variance + layer.eps).rsqrt()).view_as(weight)
        offset = bias - factor * mean.expand_as(means).reshape(weight.shape)
        factor, offset = (values.float()[..., None, None] for values in (factor, offset))
        return lambda rows, silu: _scale(rows, factor, offset, silu)


def widest_dtype(device: torch.device) -> torch.dtype:
    """Return the widest float type that a device computes in: Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and sum of squared deviations over (h, w) of (B, C, h, w), each (B, C)."""
    # Sums over rows of channels are vectorised, which makes them ten times as fast as var_mean.
    tokens = values.permute(0, 2, 3, 1).flatten(1, 2)  # [B, h·w, C]
    mean = tokens.mean(dim=1, keepdim=True)
    deviation = (tokens - mean).square_().sum(dim=1)
    return mean[:, 0].double(), deviation.double()


def _scale(rows: Tensor, factor: Tensor, offset: Tensor, silu: bool) -> Tensor:
    # Computed in float32 where the rows are halves, as by GroupNorm; on a GPU without copies.
    out = torch.addcmul(offset, rows, factor, out=torch.empty_like(rows))
    return F.silu(out, inplace=True) if silu else out


Shape = tuple[int, int, int, int]
"""(B, C, H, W)."""


class Activation(ABC):
    """A layer's output, (B, C, H, W), which is read by rows.

    Args:
        shape: (B, C, H, W).
        device: Where rows are read to.
    """

    statistics: ChannelStatistics | None = None
    """Mean and spread per channel, where a normalisation follows."""
    is_kept = False
    """Whether it is read again, so that a layer may not consume it."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        self.dtype = dtype
        self.device = device

    @abstractmethod
    def read(self, start: int, stop: int) -> Tensor:
        """Return rows as a new channels_last tensor (B, C, stop − start, W) on the device."""

    def view(self, start: int, stop: int) -> Tensor:
        """Return rows as `read` does, but not to be changed, and maybe without a copy."""
        return self.read(start, stop)

    def give_up(self, stop: int) -> None:  # noqa: B027 - nothing to do where nothing is held
        """Give the memory of the rows before `stop` back; they are not read any more."""

    def free(self) -> None:  # noqa: B027 - nothing to do where nothing is held
        """Give the memory back; the activation cannot be read any more."""


class ComputedActivation(Activation):
    """Rows that a function computes whenever they are asked for.

    Args:
        shape: (B, C, H, W).
        compute: Returns the rows from start to stop, (B, C, rows, W).
    """

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype,
        device: torch.device,
        compute: Callable[[int, int], Tensor],
    ) -> None:
        super().__init__(shape, dtype, device)
        self.read = compute  # type: ignore[method-assign]

    def read(self, start: int, stop: int) -> Tensor:
        """Return the computed rows; replaced by the function given."""
        raise NotImplementedError


def by_rows(
    function: Callable[..., Tensor],
    *inputs: Any,
    channels: int | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """Apply a function to tensors, or to activations whenever rows of the result are read.

    Args:
        function: Makes each row of what lies in the same row of the inputs.
        inputs: Maps (B, C, H, W), the first of which says what the others are; None is passed on.
        channels: Of the result; None for the first input's.
        dtype: Of the result; None for the first input's.
    """
    first = inputs[0]
    if isinstance(first, Tensor):
        return function(*inputs)

    def compute(start: int, stop: int) -> Tensor:
        return function(*(_rows_of(x, start, stop) for x in inputs))

    shape = (first.shape[0], channels or first.shape[1], *first.shape[2:])
    return ComputedActivation(shape, dtype or first.dtype, first.device, compute)


def _rows_of(x: Tensor | Activation | None, start: int, stop: int) -> Tensor | None:
    if isinstance(x, Activation):
        return x.view(start, stop)
    return None if x is None else x[:, :, start:stop]


class JoinedActivation(Activation):
    """Activations of one size side by side in their channels."""

    def __init__(self, parts: Sequence[Activation]) -> None:
        batch, _, height, width = parts[0].shape
        channels = sum(part.shape[1] for part in parts)
        super().__init__((batch, channels, height, width), parts[0].dtype, parts[0].device)
        self.parts = parts
        if all(part.statistics is not None for part in parts):
            self.statistics = ChannelStatistics.joined([part.statistics for part in parts])

    def read(self, start: int, stop: int) -> Tensor:
        """Return rows of all parts."""
        return torch.cat([part.view(start, stop) for part in self.parts], dim=1)

    def give_up(self, stop: int) -> None:
        """Give rows of all parts back."""
        for part in self.parts:
            part.give_up(stop)

    def free(self) -> None:
        """Free all parts."""
        for part in self.parts:
            part.free()


class StoredActivation(Activation):
    """Rows that can be written; writing gathers the statistics.

    The rows lie one after the other, (H, B, W, C), so that a band is one piece of memory, with the
    channels inmost as convolutions and attention take and leave them.

    Args:
        shape: (B, C, H, W).
        uses_kernels: As for `ChannelStatistics`.
    """

    def __init__(
        self, shape: Shape, dtype: torch.dtype, device: torch.device, *, uses_kernels: bool = False
    ) -> None:
        super().__init__(shape, dtype, device)
        self._uses_kernels = uses_kernels

    @abstractmethod
    def _write(self, start: int, rows: Tensor) -> None: ...

    def in_place(self, start: int, stop: int) -> Tensor | None:
        """Return rows as they lie on the device, as `read` returns them; None where they do not."""
        return None

    def view(self, start: int, stop: int) -> Tensor:
        """Return rows without a copy where they lie ready."""
        rows = self.in_place(start, stop)
        return self.read(start, stop) if rows is None else rows

    def begin(self, *, with_statistics: bool) -> None:
        """Start a new content, from row 0 on."""
        batch, channels = self.shape[:2]
        self.statistics = None
        if with_statistics:
            self.statistics = ChannelStatistics(
                batch, channels, self.device, uses_kernels=self._uses_kernels
            )

    def write(self, start: int, rows: Tensor) -> None:
        """Replace the rows from `start` on by a tensor (B, C, rows, W) on the device."""
        if self.statistics is not None:
            self.statistics.add(rows)
        self._write(start, rows)
