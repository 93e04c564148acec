"""Where activations lie: on the device, on its host, or in a temporary file."""

from __future__ import annotations

import math
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import BinaryIO

import torch
from torch import Tensor

from tadsr.errors import TADSRError
from tadsr.onestep.activations import Shape, StoredActivation
from tadsr.onestep.tasks import available_bytes

Free = Callable[[], None]

_ALIGNMENT_BYTES = 64
_PART_BYTES = 2**25
"""What an activation asks for at once: small beside large activations, of which parts may then lie
anywhere and be given back early; large beside a band, which seldom lies in two."""
_DEVICE_PART_BYTES = 2**28
"""The same on an accelerator, whose bands are larger."""


class _PartedActivation(StoredActivation):
    """Rows in parts that find room one by one, when they are first written."""

    def __init__(
        self, storage: BandStorage, shape: Shape, dtype: torch.dtype, part_bytes: int
    ) -> None:
        super().__init__(shape, dtype, storage.device, uses_kernels=storage.uses_kernels)
        self._storage = storage
        batch, channels, _, width = shape
        self._row_shape = (batch, width, channels)
        self._rows_per_part = max(1, part_bytes // count_bytes((batch, channels, 1, width), dtype))
        self._parts: dict[int, _MemoryPart | _FilePart] = {}

    def read(self, start: int, stop: int) -> Tensor:
        batch, width, channels = self._row_shape
        place = (batch, stop - start, width, channels)
        rows = torch.empty(place, dtype=self.dtype, device=self._storage.device)
        for number, first, last in self._overlapped(start, stop):
            target = rows[:, first - start : last - start].transpose(0, 1)
            self._parts[number].read(first - number * self._rows_per_part, target)
        return rows.permute(0, 3, 1, 2)

    def _write(self, start: int, rows: Tensor) -> None:
        rows = rows.permute(2, 0, 3, 1)
        for number, first, last in self._overlapped(start, start + len(rows)):
            if number not in self._parts:
                height = min(self._rows_per_part, self.shape[2] - number * self._rows_per_part)
                self._parts[number] = self._storage.take((height, *self._row_shape), self.dtype)
            part_rows = rows[first - start : last - start]
            self._parts[number].write(first - number * self._rows_per_part, part_rows)

    def in_place(self, start: int, stop: int) -> Tensor | None:
        number, last = start // self._rows_per_part, (stop - 1) // self._rows_per_part
        part = self._parts.get(number)
        is_memory = number == last and isinstance(part, _MemoryPart)
        if not is_memory or part.rows.device.type != self._storage.device.type:
            return None
        batch, width, channels = self._row_shape
        if batch != 1:  # rows of several images alternate, which is no layout that layers take
            return None
        first = number * self._rows_per_part
        rows = part.rows[start - first : stop - first].view(1, stop - start, width, channels)
        return rows.permute(0, 3, 1, 2)

    def give_up(self, stop: int) -> None:
        for number in [n for n in self._parts if (n + 1) * self._rows_per_part <= stop]:
            self._parts.pop(number).free()

    def free(self) -> None:
        self.give_up(self.shape[2] + self._rows_per_part)

    def _overlapped(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield the number of each part, and the first and last of the rows that it has."""
        size = self._rows_per_part
        for number in range(start // size, -(-stop // size)):
            yield number, max(start, number * size), min(stop, (number + 1) * size)


class _MemoryPart:
    def __init__(self, rows: Tensor, free: Free) -> None:
        self.rows = rows
        self.free = free

    def read(self, start: int, target: Tensor) -> None:
        rows = self.rows[start : start + len(target)]
        # A strided copy between devices goes element by element.
        target.copy_(rows.to(target.device, non_blocking=True))

    def write(self, start: int, rows: Tensor) -> None:
        place = self.rows[start : start + len(rows)]
        is_near = rows.device == place.device
        place.copy_(rows if is_near else rows.contiguous(), non_blocking=True)


class _FilePart:
    def __init__(self, file: _SpillFile, start: int, row_bytes: int) -> None:
        self._file = file
        self._start = start
        self._row_bytes = row_bytes

    def read(self, start: int, target: Tensor) -> None:
        is_ready = target.is_contiguous() and target.device.type == "cpu"
        rows = target if is_ready else torch.empty(target.shape, dtype=target.dtype)
        self._file.read(self._start + start * self._row_bytes, _bytes_of(rows))
        if not is_ready:
            target.copy_(rows.to(target.device))

    def write(self, start: int, rows: Tensor) -> None:
        content = _bytes_of(rows.contiguous().cpu())
        self._file.write(self._start + start * self._row_bytes, content)

    def free(self) -> None:
        self._file.give_back(self._start)


class _Regions:
    """Places regions in a row of bytes, each as far to the front as there is room.

    Memory that a process, or a file, touches first is cleared by the system, which takes several
    times as long as to write it once more: regions that follow each other should overlap.
    """

    def __init__(self, num_bytes: int | None = None) -> None:
        self._num_bytes = num_bytes
        self._taken: list[tuple[int, int]] = []

    def take(self, num_bytes: int) -> int | None:
        """Return where a region starts, or None if there is no room."""
        start = 0
        for first, stop in self._taken:
            if first - start >= num_bytes:
                break
            start = -(-stop // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        if self._num_bytes is not None and start + num_bytes > self._num_bytes:
            return None
        self._taken.append((start, start + num_bytes))
        self._taken.sort()
        return start

    def give_back(self, start: int) -> None:
        """Free the region that starts there."""
        self._taken = [region for region in self._taken if region[0] != start]


class _Arena:
    """Memory of the CPU."""

    def __init__(self, num_bytes: int) -> None:
        self._regions = _Regions(num_bytes)
        # An address range: the system gives memory where it is written.
        self._memory = torch.empty(num_bytes, dtype=torch.uint8)

    def take(self, num_bytes: int) -> tuple[Tensor, Free] | None:
        start = self._regions.take(num_bytes)
        if start is None:
            return None
        memory = self._memory[start : start + num_bytes]
        return memory, partial(self._regions.give_back, start)


class _CachedMemory:
    """Memory of an accelerator, or pinned for one, which torch itself keeps for reuse."""

    def __init__(self, place: torch.device, num_bytes: int | None) -> None:
        self._place = place
        self._left = math.inf if num_bytes is None else num_bytes

    def take(self, num_bytes: int) -> tuple[Tensor, Free] | None:
        if num_bytes > self._left:
            return None
        is_host = self._place.type == "cpu"
        memory = torch.empty(num_bytes, dtype=torch.uint8, device=self._place, pin_memory=is_host)
        self._left -= num_bytes
        return memory, partial(self._give_back, num_bytes)

    def _give_back(self, num_bytes: int) -> None:
        self._left += num_bytes


class _SpillFile:
    """An unnamed temporary file, which is gone with the process however that ends."""

    def __init__(self, folder: str | None) -> None:
        self._folder = folder
        self._file: BinaryIO | None = None
        self._regions = _Regions()

    def take(self, num_bytes: int) -> int:
        """Return where a region starts; room is asked for now, so that a full disk is told here."""
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder, prefix="tadsr-")  # noqa: SIM115
            weakref.finalize(self, self._file.close)
        start = self._regions.take(num_bytes)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), start, num_bytes)
        except OSError as error:
            # Of this image alone: for a run over many it is no full disk of results.
            raise TADSRError(
                f"a temporary file must have room for {num_bytes} bytes more, but: "
                f"{error.strerror}; name another folder with TMPDIR, or allow more memory"
            ) from None
        return start

    def give_back(self, start: int) -> None:
        self._regions.give_back(start)

    def write(self, start: int, content: memoryview) -> None:
        self._file.seek(start)
        self._file.write(content)

    def read(self, start: int, target: memoryview) -> None:
        self._file.seek(start)
        # A read may end early, at 2 GiB at the latest.
        done = 0
        while done < len(target):
            count = self._file.readinto(target[done:])
            if not count:
                raise OSError("a temporary file must hold all rows written to it, got its end")
            done += count


class BandStorage:
    """Room for activations: the device first, then host memory, then a file.

    Args:
        device_bytes: Bytes of activations to keep on it; None for what is free.
        host_bytes: Bytes to keep in pinned host memory beside an accelerator; None for no limit.
            On the CPU there is no such place.
        folder: Folder of temporary files; None for the system's.
        uses_kernels: Whether a GPU's kernels measure and normalise what is stored.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        device_bytes: int | None = None,
        host_bytes: int | None = None,
        folder: str | None = None,
        uses_kernels: bool = False,
    ) -> None:
        self.device = device
        self.uses_kernels = uses_kernels
        self.spilled_bytes = 0
        if device.type == "cpu":
            room = available_bytes(device) if device_bytes is None else device_bytes
            self._places = [_Arena(room)]
        else:
            host = torch.device("cpu")
            self._places = [_CachedMemory(device, device_bytes), _CachedMemory(host, host_bytes)]
        self._file = _SpillFile(folder)

    def allocate(
        self, shape: Shape, dtype: torch.dtype, *, in_one_piece: bool = False
    ) -> StoredActivation:
        """Return an activation without content; it finds room as it is written.

        Args:
            shape: (B, C, H, W).
        """
        part_bytes = _PART_BYTES if self.device.type == "cpu" else _DEVICE_PART_BYTES
        if in_one_piece:
            part_bytes = count_bytes(shape, dtype)
        return _PartedActivation(self, shape, dtype, part_bytes)

    def take(self, shape: Shape, dtype: torch.dtype) -> _MemoryPart | _FilePart:
        """Return room for some rows (rows, B, W, C)."""
        num_bytes = count_bytes(shape, dtype)
        for place in self._places:
            found = place.take(num_bytes)
            if found is not None:
                memory, free = found
                return _MemoryPart(memory.view(dtype).view(shape), free)
        self.spilled_bytes += num_bytes
        return _FilePart(self._file, self._file.take(num_bytes), num_bytes // shape[0])


class _PlannedActivation(StoredActivation):
    def __init__(self, storage: PlannedStorage, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__(shape, dtype, storage.device)
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
    """Counts what the layers would keep, and keeps nothing."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device, device_bytes=0)
        self.peak_bytes = 0
        self._bytes = 0

    def allocate(
        self, shape: Shape, dtype: torch.dtype, *, in_one_piece: bool = False
    ) -> StoredActivation:
        """Return an activation without content."""
        return _PlannedActivation(self, shape, dtype)

    def count(self, num_bytes: int) -> None:
        """Take in an allocation, or with a negative number the end of one."""
        self._bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self._bytes)


def count_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """Return the bytes of an activation."""
    return dtype.itemsize * math.prod(shape)


def _bytes_of(rows: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor; NumPy has no bfloat16, but has bytes."""
    return memoryview(rows.reshape(-1).view(torch.uint8).numpy())
