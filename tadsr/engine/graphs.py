"""CUDA graphs of the networks: one launch in place of hundreds."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

Stage = Callable[..., tuple[Tensor, Tensor]]
"""From tensors to a result and whether it is finite."""

_WARM_UPS = 3


class Graph:
    """A stage recorded for tensors of fixed shapes.

    Args:
        stage: Computes on the device only, without waiting for it.
        inputs: Tensors that are new at each run.
        conditions: Tensors that often are those of the run before, and are never written to.
        pool: Memory that graphs share.
    """

    def __init__(
        self, stage: Stage, inputs: Sequence[Tensor], conditions: Sequence[Tensor], pool: object
    ) -> None:
        self._inputs = [x.clone() for x in inputs]
        self._conditions = [x.clone() for x in conditions]
        self._current = list(conditions)
        device = self._inputs[0].device
        arguments = (*self._inputs, *self._conditions)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), _measured_convolutions():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    stage(*arguments)
            torch.cuda.current_stream().wait_stream(stream)
            # Other threads may go on using the GPU, as one that copies results does.
            mode = "thread_local"
            with torch.cuda.graph(self._graph, pool=pool, capture_error_mode=mode):
                self._outputs = stage(*arguments)

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
        result, is_finite = self._outputs
        return result.clone(), is_finite.clone()


class GraphCache:
    """Records a stage when a shape comes the second time, and keeps what was used last.

    Args:
        max_graphs: Graphs that are kept.
    """

    def __init__(self, max_graphs: int) -> None:
        self.max_graphs = max_graphs
        self.graphs: OrderedDict[Hashable, Graph] = OrderedDict()
        self._seen: set[Hashable] = set()
        self._pool: object = None
        self._is_off = False

    def run(
        self, name: str, stage: Stage, inputs: Sequence[Tensor], conditions: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Tensor]:
        """Run a stage, recorded or not.

        Args:
            name: Of the stage.
            stage: As in `Graph`.
            inputs: As in `Graph`.
            conditions: As in `Graph`.
        """
        key = (name, *((x.shape, x.dtype) for x in (*inputs, *conditions)))
        if self._is_off or (key not in self.graphs and key not in self._seen):
            # The first run loads kernels and measures; many shapes never come again.
            self._seen.add(key)
            return stage(*inputs, *conditions)
        if key not in self.graphs:
            graph = self._record(stage, inputs, conditions)
            if graph is None:
                return stage(*inputs, *conditions)
            self.graphs[key] = graph
            if len(self.graphs) > self.max_graphs:
                self.graphs.popitem(last=False)
        self.graphs.move_to_end(key)
        return self.graphs[key].run(inputs, conditions)

    def _record(
        self, stage: Stage, inputs: Sequence[Tensor], conditions: Sequence[Tensor]
    ) -> Graph | None:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            return Graph(stage, inputs, conditions, self._pool)
        except RuntimeError as error:
            # Out of memory, or an operation that cannot be recorded: go on without.
            self._is_off = True
            self.graphs.clear()
            torch.cuda.empty_cache()
            warnings.warn(
                f"a CUDA graph could not be recorded ({error}); every kernel is launched by itself "
                "from now on, which is slower for small images",
                stacklevel=2,
            )
            return None


@contextmanager
def _measured_convolutions() -> Iterator[None]:
    """Let cuDNN measure its algorithms: the choice is paid once and lasts as long as a graph."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
