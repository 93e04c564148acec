"""What a GPU replays, since to start its many small parts would take longer than they do."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

GRAPH_AFTER = 3
"""Steps before one is recorded as a CUDA graph, which are done on a stream of their own."""


class Repeated:
    """Run a step that reads and writes tensors in their places; on CUDA, replay a recording.

    Args:
        step: Must leave gradients where a first backward pass puts them, and wait for nothing.
    """

    def __init__(self, step: Callable[[], None], *, is_recorded: bool) -> None:
        self.step, self.is_recorded = step, is_recorded
        self.count = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Do one step."""
        self.count += 1
        if not self.is_recorded:
            self.step()
        elif self.count <= GRAPH_AFTER:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.step()
            torch.cuda.current_stream().wait_stream(stream)
        else:
            if self.graph is None:
                self.graph = self.record()
            if self.graph is None:
                self.step()
            else:
                self.graph.replay()

    def record(self) -> torch.cuda.CUDAGraph | None:
        """Record a step, or say why it cannot be."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.step()
        except RuntimeError as error:
            traceback.print_exception(error)
            print("a step cannot be recorded; going on without", flush=True)
            self.is_recorded = False
            return None
        return graph


class Replayed:
    """A function of a tensor that always has the same shape and type; on CUDA, replayed.

    Args:
        function: Must wait for nothing. On CUDA what it returns is overwritten by the next call.
    """

    def __init__(self, function: Callable[[Tensor], Any], *, is_recorded: bool) -> None:
        self.function = function
        self.repeated = Repeated(self._run, is_recorded=is_recorded)
        self.argument: Tensor | None = None
        self.result: Any = None

    def __call__(self, argument: Tensor) -> Any:
        """Return what the function makes of the argument."""
        if self.argument is None:
            self.argument = torch.empty_like(argument)
        self.argument.copy_(argument)
        self.repeated()
        return self.result

    def _run(self) -> None:
        self.result = self.function(self.argument)
