"""`torch.cuda` of a device that is not there: streams, events, graphs, memory, properties."""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch

from .tensors import PretendDevice
from .values import spoil


class Stream:
    """A stream; all work is done in order on one."""

    device: PretendDevice

    def __init__(self, *_: Any, **__: Any) -> None:
        self.cuda_stream = 0

    def wait_stream(self, other: Stream) -> None: ...
    def wait_event(self, event: Event) -> None: ...
    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def synchronize(self) -> None:
        self.device.wait("stream.synchronize")


class Event:
    device: PretendDevice

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, stream: Stream | None = None) -> None: ...
    def wait(self, stream: Stream | None = None) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        return 1.0

    def synchronize(self) -> None:
        self.device.wait("event.synchronize")


class CUDAGraph:
    """Recorded operations, which a replay computes again into the same memory."""

    device: PretendDevice

    def __init__(self, *_: Any, **__: Any) -> None:
        self.steps: list[Callable[[], None]] = []
        self.launches: Counter[str] = Counter()

    def replay(self) -> None:
        self.device.launches.update(self.launches)
        self.device.num_replays += 1
        for step in self.steps:
            step()

    def reset(self) -> None:
        self.steps.clear()

    def pool(self) -> tuple[int, int]:
        return (0, 1)


def stand_in(device: PretendDevice, capability: tuple[int, int], processors: int) -> dict[str, Any]:
    """Return what takes the place of attributes of `torch.cuda`."""

    @contextmanager
    def on_device(index: Any = None):
        before = device.current
        number = index if isinstance(index, int) else torch.device(index or "cuda").index
        if number is not None and number >= 0:
            device.current = number
        try:
            yield
        finally:
            device.current = before

    @contextmanager
    def on_stream(stream: Stream | None = None):
        yield stream

    @contextmanager
    def record(graph: CUDAGraph, *_: Any, **__: Any):
        before, device.launches = device.launches, graph.launches
        device.recording = graph.steps
        try:
            yield
        finally:
            device.recording, device.launches = None, before
            for out in device.recorded:
                spoil(out)  # recording computes nothing
            device.recorded.clear()

    name = f"Pretend {capability[0]}.{capability[1]}"
    properties = types.SimpleNamespace(
        name=name,
        major=capability[0],
        minor=capability[1],
        total_memory=device.total_bytes,
        multi_processor_count=processors,
        gcnArchName="gfx942",
        uuid="0",
    )
    kinds = {
        kind.__name__: type(kind.__name__, (kind,), {"device": device})
        for kind in (Stream, Event, CUDAGraph)
    }
    one = kinds["Stream"]()
    used = lambda *_: device.live_bytes  # noqa: E731
    return {
        **kinds,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "device_count": lambda: 2,
        "current_device": lambda: device.current,
        "set_device": lambda index: setattr(device, "current", torch.device(index).index or 0),
        "device": on_device,
        "get_device_name": lambda *_: name,
        "get_device_capability": lambda *_: capability,
        "get_device_properties": lambda *_: properties,
        "is_bf16_supported": lambda *_, **__: capability >= (8, 0),
        "stream": on_stream,
        "current_stream": lambda *_: one,
        "default_stream": lambda *_: one,
        "set_stream": lambda *_: None,
        "synchronize": lambda *_: device.wait("synchronize"),
        "graph": record,
        "graph_pool_handle": lambda: (0, 1),
        "is_current_stream_capturing": lambda: device.recording is not None,
        "mem_get_info": lambda *_: (device.total_bytes - device.live_bytes, device.total_bytes),
        "memory_allocated": used,
        "memory_reserved": used,
        "max_memory_allocated": used,
        "reset_peak_memory_stats": lambda *_: None,
        "empty_cache": lambda: None,
    }
