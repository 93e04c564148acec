"""Activations that are read and written in bands of rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tadsr.onestep.statistics import ChannelStatistics

Shape = tuple[int, int, int, int]
"""(B, C, H, W)."""


class Activation(ABC):
    """A layer's output, (B, C, H, W), which is read by rows.

    Args:
        shape: (B, C, H, W).
    """

    statistics: ChannelStatistics | None = None
    """Mean and spread per channel, where a normalisation follows."""
    is_kept = False
    """Whether it is read again, so that a layer may not consume it."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        self.shape = shape
        self.dtype = dtype

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
        self, shape: Shape, dtype: torch.dtype, compute: Callable[[int, int], Tensor]
    ) -> None:
        super().__init__(shape, dtype)
        self.read = compute  # type: ignore[method-assign]

    def read(self, start: int, stop: int) -> Tensor:
        """Return the computed rows; replaced by the function given."""
        raise NotImplementedError


class JoinedActivation(Activation):
    """Activations of one size side by side in their channels."""

    def __init__(self, parts: Sequence[Activation]) -> None:
        batch, _, height, width = parts[0].shape
        channels = sum(part.shape[1] for part in parts)
        super().__init__((batch, channels, height, width), parts[0].dtype)
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
        super().__init__(shape, dtype)
        self._device = device
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
                batch, channels, self._device, uses_kernels=self._uses_kernels
            )

    def write(self, start: int, rows: Tensor) -> None:
        """Replace the rows from `start` on by a tensor (B, C, rows, W) on the device."""
        if self.statistics is not None:
            self.statistics.add(rows)
        self._write(start, rows)
