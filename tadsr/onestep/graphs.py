"""CUDA graphs of the networks: one launch in place of hundreds."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from tadsr.errors import TADSRWarning
from tadsr.locks import Lock
from tadsr.onestep.tasks import available_bytes

MAX_ERROR = 0.05
"""Largest relative error of a stage: above what half precision rounds, below what is visible."""


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of what is expected; waits for the device."""
    found, expected = found.float(), expected.float()
    smallest = torch.finfo(torch.float32).tiny
    return ((found - expected).norm() / expected.norm().clamp(min=smallest)).item()


Stage = Callable[..., tuple[Tensor, Tensor]]
"""From tensors to a result and whether it is finite."""

_WARM_UPS = 3
_FREE_SHARE = 0.25
"""Part of a device's memory that must be free for a graph to be recorded."""
_MAX_COUNTED_SHAPES = 1024
_recording = Lock()
"""One at a time in a process: a recording fails where another thread's allocates."""
_STALE_AFTER = 4
"""A graph makes room for another when so many runs for each kept graph went by without it."""


class Graph:
    """A stage recorded for tensors of fixed shapes."""

    def __init__(
        self,
        stage: Stage,
        inputs: Sequence[Tensor],
        conditions: Sequence[Tensor],
        pool: object,
        stream: torch.cuda.Stream,
    ) -> None:
        self._inputs = [x.clone() for x in inputs]
        self._conditions = [x.clone() for x in conditions]
        self._current = list(conditions)
        arguments = (*self._inputs, *self._conditions)
        self._graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream()
        stream.wait_stream(current)
        try:
            with _measured_convolutions(self._inputs[0].dtype):
                with torch.cuda.stream(stream):
                    for _ in range(_WARM_UPS):
                        expected, largest = stage(*arguments)
                current.wait_stream(stream)
                # Other threads may go on using the GPU, as one that copies results does.
                mode = "thread_local"
                with torch.cuda.graph(self._graph, pool, stream, capture_error_mode=mode):
                    self._outputs = stage(*arguments)
        finally:
            # Recording that fails leaves its own stream behind.
            torch.cuda.set_stream(current)
        self._graph.replay()
        if largest < torch.inf and not relative_error(self._outputs[0], expected) < MAX_ERROR:
            raise RuntimeError("its first replay differs from what was recorded")

    def run(self, inputs: Sequence[Tensor], conditions: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Replay with other tensors of the same shapes."""
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        for index, given in enumerate(conditions):
            if given is not self._current[index]:
                self._conditions[index].copy_(given)
                self._current[index] = given
        self._graph.replay()
        # Copies: another graph of the pool may compute where this one left its result.
        result, largest = self._outputs
        return result.clone(), largest.clone()


class GraphCache:
    """Records a stage when a shape has come often, and keeps what is used.

    Recording measures every convolution and computes the stage several times, which pays only for
    a shape that goes on coming. More shapes in rotation than there is room for are computed
    without a graph.

    Args:
        record: Makes what runs a stage from stage, inputs and conditions; None records a `Graph`.
    """

    def __init__(
        self, max_graphs: int, record_after: int = 20, record: Callable[..., Graph] | None = None
    ) -> None:
        self.max_graphs = max_graphs
        self.record_after = record_after
        self.graphs: OrderedDict[Hashable, Graph] = OrderedDict()
        self.pool_bytes = 0
        """Memory that the graphs hold, and nothing else can use."""
        self._record = record or self._record_graph
        self._uses: OrderedDict[Hashable, int] = OrderedDict()
        self._refused: set[Hashable] = set()
        self._used_at: dict[Hashable, int] = {}
        self._num_runs = 0
        self._pool: tuple[object, torch.cuda.Stream] | None = None

    def run(
        self, name: str, stage: Stage, inputs: Sequence[Tensor], conditions: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Tensor]:
        """Run a stage, recorded or not, on the current device."""
        self._num_runs += 1
        key = (name, *((x.shape, x.dtype) for x in (*inputs, *conditions)))
        if key not in self.graphs and not (
            self._is_worth_recording(key) and _has_room(inputs[0].device)
        ):
            return stage(*inputs, *conditions)
        graph = self.graphs.get(key) or self._try_to_record(key, stage, inputs, conditions)
        if graph is None:
            return stage(*inputs, *conditions)
        self.graphs.move_to_end(key)
        self._used_at[key] = self._num_runs
        return graph.run(inputs, conditions)

    def clear(self) -> None:
        """Drop all graphs and the memory they share."""
        self.graphs.clear()
        # A pool whose graphs are all gone must not be captured into again.
        self._pool = None
        self.pool_bytes = 0

    def _is_worth_recording(self, key: Hashable) -> bool:
        uses = self._uses[key] = self._uses.pop(key, 0) + 1
        if len(self._uses) > _MAX_COUNTED_SHAPES:
            self._uses.popitem(last=False)
        if uses <= self.record_after or key in self._refused:
            return False
        if len(self.graphs) < self.max_graphs:
            return True
        oldest = self._used_at[next(iter(self.graphs))]
        return self._num_runs - oldest > _STALE_AFTER * self.max_graphs

    def _try_to_record(
        self,
        key: Hashable,
        stage: Stage,
        inputs: Sequence[Tensor],
        conditions: Sequence[Tensor],
    ) -> Graph | None:
        if len(self.graphs) == self.max_graphs:
            self.graphs.popitem(last=False)
        problem = None
        try:
            with _recording:
                self.graphs[key] = self._record(stage, inputs, conditions)
        except Exception as error:
            # Out of memory, or an operation that cannot be recorded: go on without.
            problem = str(error)
        if problem is None:
            return self.graphs[key]
        # Not in the handler, which keeps what was being recorded alive.
        is_first = not self._refused
        self._refused.add(key)
        self.clear()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        if is_first:
            warnings.warn(
                f"a CUDA graph could not be recorded ({problem}); at such sizes every kernel is "
                "launched by itself, which is slower for small images",
                TADSRWarning,
                stacklevel=2,
            )
        return None

    def _record_graph(
        self, stage: Stage, inputs: Sequence[Tensor], conditions: Sequence[Tensor]
    ) -> Graph:
        device = inputs[0].device
        if self._pool is None:
            # Of this device; torch's own capture stream is that of whichever device came first.
            self._pool = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        reserved = torch.cuda.memory_reserved(device)
        graph = Graph(stage, inputs, conditions, *self._pool)
        self.pool_bytes += max(0, torch.cuda.memory_reserved(device) - reserved)
        return graph


def _has_room(device: torch.device) -> bool:
    """Tell whether a device has memory to spare, as a graph keeps what it computes with."""
    if device.type != "cuda":
        return True
    _, total = torch.cuda.mem_get_info(device)
    return available_bytes(device) > _FREE_SHARE * total


@contextmanager
def _measured_convolutions(dtype: torch.dtype) -> Iterator[None]:
    """Let cuDNN measure its algorithms: the choice is paid once and lasts as long as a graph."""
    cudnn = torch.backends.cudnn
    benchmark, allow_tf32 = cudnn.benchmark, _allowed_tf32()
    # MIOpen compiles what it measures, which takes minutes.
    cudnn.benchmark = torch.version.hip is None
    # torch looks algorithms up by shape and by this flag, which means nothing to half precision.
    # As it was, what the first run took by rule would be found, and nothing measured.
    is_flipped = allow_tf32 is not None and dtype != torch.float32
    if is_flipped:
        cudnn.allow_tf32 = not allow_tf32
    try:
        yield
    finally:
        cudnn.benchmark = benchmark
        if is_flipped:
            cudnn.allow_tf32 = allow_tf32


def _allowed_tf32() -> bool | None:
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:  # set by its successors, with which it cannot be mixed
        return None
