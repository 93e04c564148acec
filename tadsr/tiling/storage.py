"""Activations that are read and written in bands of rows, wherever there is room for them."""

from __future__ import annotations

import math
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tadsr.errors import TADSRError
from tadsr.tiling.statistics import ChannelStatistics

Shape = tuple[int, int, int, int]
"""(B, C, H, W)."""


class Activation(ABC):
    """What a layer leaves for the next, (B, C, H, W), accessible by rows.

    Args:
        shape: (B, C, H, W).
        dtype: Of the elements.
    """

    statistics: ChannelStatistics | None = None
    """Mean and spread per channel, where a normalisation follows."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        self.shape = shape
        self.dtype = dtype

    @abstractmethod
    def read(self, start: int, stop: int) -> Tensor:
        """Return rows as a new channels_last tensor (B, C, stop − start, W) on the device."""

    def free(self) -> None:  # noqa: B027 - nothing to do where nothing is held
        """Give the memory back; the activation cannot be read any more."""


class ComputedActivation(Activation):
    """Rows that a function computes whenever they are asked for.

    Args:
        shape: (B, C, H, W).
        dtype: Of the elements.
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
    """Activations of one size side by side in their channels; freeing it frees none of them."""

    def __init__(self, parts: Sequence[Activation]) -> None:
        batch, _, height, width = parts[0].shape
        channels = sum(part.shape[1] for part in parts)
        super().__init__((batch, channels, height, width), parts[0].dtype)
        self.parts = parts
        if all(part.statistics is not None for part in parts):
            self.statistics = ChannelStatistics.joined([part.statistics for part in parts])

    def read(self, start: int, stop: int) -> Tensor:
        """Return rows of all parts."""
        return torch.cat([part.read(start, stop) for part in self.parts], dim=1)


class StoredActivation(Activation):
    """Rows that can be written; writing gathers the statistics.

    The rows lie one after the other, (H, B, W, C), so that a band is one piece of memory, with the
    channels inmost as convolutions and attention take and leave them.
    """

    @abstractmethod
    def _write(self, start: int, rows: Tensor) -> None: ...

    def begin(self, *, with_statistics: bool) -> None:
        """Start a new content, from row 0 on."""
        batch, channels = self.shape[:2]
        self.statistics = ChannelStatistics(batch, channels) if with_statistics else None

    def write(self, start: int, rows: Tensor) -> None:
        """Replace the rows from `start` on by a tensor (B, C, rows, W) on the device."""
        if self.statistics is not None:
            self.statistics.add(rows)
        self._write(start, rows)


class _TensorActivation(StoredActivation):
    def __init__(self, storage: BandStorage, shape: Shape, dtype: torch.dtype, place) -> None:
        super().__init__(shape, dtype)
        self._storage = storage
        batch, channels, height, width = shape
        self._is_host = place.type != storage.device.type
        self._rows = torch.empty(
            (height, batch, width, channels), dtype=dtype, device=place, pin_memory=self._is_host
        )

    def read(self, start: int, stop: int) -> Tensor:
        rows = self._rows[start:stop].to(self._storage.device, non_blocking=True)
        return _as_map(rows).clone(memory_format=torch.channels_last)

    def _write(self, start: int, rows: Tensor) -> None:
        rows = rows.permute(2, 0, 3, 1)
        place = self._rows[start : start + len(rows)]
        # Contiguous first: a strided copy between devices goes element by element.
        place.copy_(rows.contiguous() if self._is_host else rows, non_blocking=True)

    def free(self) -> None:
        if self._rows is not None:
            self._storage.give_back(self._rows.nbytes, is_host=self._is_host)
        self._rows = None


class _FileActivation(StoredActivation):
    """Rows in an unnamed temporary file, which is gone with the process however that ends."""

    def __init__(self, storage: BandStorage, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__(shape, dtype)
        self._device = storage.device
        batch, channels, _, width = shape
        self._row_shape = (batch, width, channels)
        self._row_bytes = batch * channels * width * dtype.itemsize
        self._file = tempfile.TemporaryFile(dir=storage.folder, prefix="tadsr-")  # noqa: SIM115
        # Room is asked for now: a full disk is an error here rather than in the middle.
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self._file.fileno(), 0, shape[2] * self._row_bytes)
            except OSError as error:
                self._file.close()
                # Of this image alone: for a run over many it is no full disk of results.
                raise TADSRError(
                    f"a temporary file must have room for {shape[2] * self._row_bytes} bytes, but: "
                    f"{error.strerror}; name another folder with TMPDIR, or allow more memory"
                ) from None

    def read(self, start: int, stop: int) -> Tensor:
        rows = torch.empty((stop - start, *self._row_shape), dtype=self.dtype)
        self._file.seek(start * self._row_bytes)
        _read_whole(self._file, _bytes_of(rows))
        return _as_map(rows.to(self._device)).contiguous(memory_format=torch.channels_last)

    def _write(self, start: int, rows: Tensor) -> None:
        rows = rows.permute(2, 0, 3, 1).contiguous().cpu()
        self._file.seek(start * self._row_bytes)
        self._file.write(_bytes_of(rows))

    def free(self) -> None:
        self._file.close()


class BandStorage:
    """Room for activations: the device first, then host memory, then a file.

    Args:
        device: Where bands are computed.
        device_bytes: Bytes of activations to keep on it; None for no limit.
        host_bytes: Bytes to keep in pinned host memory beside an accelerator; None for no limit.
            On the CPU there is no such place.
        folder: Folder of temporary files; None for the system's.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        device_bytes: int | None = None,
        host_bytes: int | None = None,
        folder: str | None = None,
    ) -> None:
        self.device = device
        self.folder = folder
        self.spilled_bytes = 0
        self._limits = {False: device_bytes, True: 0 if device.type == "cpu" else host_bytes}
        self._used = {False: 0, True: 0}

    def allocate(self, shape: Shape, dtype: torch.dtype) -> StoredActivation:
        """Return an activation with undefined content.

        Args:
            shape: (B, C, H, W).
            dtype: Of the elements.

        Raises:
            TADSRError: The temporary file finds no room.
        """
        num_bytes = count_bytes(shape, dtype)
        for is_host, place in ((False, self.device), (True, torch.device("cpu"))):
            limit = self._limits[is_host]
            if limit is None or self._used[is_host] + num_bytes <= limit:
                activation = _TensorActivation(self, shape, dtype, place)
                self._used[is_host] += num_bytes
                return activation
        self.spilled_bytes += num_bytes
        return _FileActivation(self, shape, dtype)

    def give_back(self, num_bytes: int, *, is_host: bool) -> None:
        """Count memory as free again."""
        self._used[is_host] -= num_bytes


class _PlannedActivation(StoredActivation):
    def __init__(self, storage: PlannedStorage, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__(shape, dtype)
        self._storage = storage
        self._num_bytes = count_bytes(shape, dtype)
        storage.count(self._num_bytes)

    def read(self, start: int, stop: int) -> Tensor:
        raise RuntimeError("a planned activation has no content")

    def _write(self, start: int, rows: Tensor) -> None:
        raise RuntimeError("a planned activation has no content")

    def free(self) -> None:
        self._storage.count(-self._num_bytes)
        self._num_bytes = 0


class PlannedStorage(BandStorage):
    """Counts what the layers would keep, and keeps nothing.

    Args:
        device: Where bands would be computed.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.peak_bytes = 0
        self._bytes = 0

    def allocate(self, shape: Shape, dtype: torch.dtype) -> StoredActivation:
        """Return an activation without content."""
        return _PlannedActivation(self, shape, dtype)

    def count(self, num_bytes: int) -> None:
        """Take in an allocation, or with a negative number the end of one."""
        self._bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self._bytes)


def count_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """Return the bytes of an activation."""
    return dtype.itemsize * math.prod(shape)


def _as_map(rows: Tensor) -> Tensor:
    """Return stored rows (rows, B, W, C) as (B, C, rows, W)."""
    return rows.permute(1, 3, 0, 2)


def _bytes_of(rows: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor; NumPy has no bfloat16, but has bytes."""
    return memoryview(rows.reshape(-1).view(torch.uint8).numpy())


def _read_whole(file, target: memoryview) -> None:
    # A read may end early, at 2 GiB at the latest.
    done = 0
    while done < len(target):
        count = file.readinto(target[done:])
        if not count:
            raise OSError("a temporary file must hold all rows written to it, got its end")
        done += count
