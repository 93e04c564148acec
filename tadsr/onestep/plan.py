"""What the engine does on a device: every switch, and the choice of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from tadsr.config import EngineName as EngineName
from tadsr.kernels.backends import unsupported_reasons

Upsampling = Literal["transposed", "enlarged", "measured"]
"""One transposed convolution, nearest enlargement and a convolution, or the faster of both."""

CUDNN_ATTENTION_CAPABILITY = (9, 0)
"""The compute capability where cuDNN's attention is the fastest; elsewhere it is slower."""
GRAPHED_PIXELS = 2 * 1024 * 1024
"""Above this area of a batch's output the GPU is busy for longer than launches take."""


@dataclass(frozen=True)
class EnginePlan:
    """Switches of the fused engine; the result is the same with any of them."""

    channels_last: bool = True
    """Whether activations and convolution weights are NHWC in memory."""
    fused_kernels: bool = False
    """Whether biases, normalisations, activations and residuals go through `tadsr.kernels`;
    otherwise through torch, biases inside the convolutions."""
    upsampling: Upsampling = "transposed"
    """How activations are enlarged by two; "measured" measures each layer once per shape, on
    CUDA only."""
    multiplied: torch.dtype | None = None
    """Type in which a CPU multiplies inside the networks, with sums, residuals, statistics, first
    and last layers in the weights' own; None for that everywhere."""
    attention_backends: tuple[SDPBackend, ...] = ()
    """Implementations of self-attention in order of preference; () for torch's choice."""
    graphs: bool = False
    """Whether CUDA graphs are recorded for shapes that come often."""
    record_after: int = 20
    """Runs of a shape before it is recorded, at least 1."""
    max_graphs: int = 24
    """Recorded graphs that are kept, at least 3: an image needs three, one a network."""
    max_graphed_pixels: int = GRAPHED_PIXELS
    """Largest output, batch × height × width in px, that is recorded."""

    def __post_init__(self) -> None:
        if self.upsampling not in get_args(Upsampling):
            raise ValueError(
                f"upsampling must be one of {', '.join(get_args(Upsampling))}, "
                f"got {self.upsampling!r}"
            )
        if self.record_after < 1:
            raise ValueError(f"record_after must be at least 1, got {self.record_after}")
        if self.max_graphs < 3:
            raise ValueError(f"max_graphs must be at least 3, got {self.max_graphs}")


def choose_plan(device: torch.device, dtype: torch.dtype) -> EnginePlan | None:
    """Choose the switches for a device."""
    if device.type == "cpu":
        return EnginePlan()
    if device.type != "cuda":
        return None
    # Without kernels channels_last makes GroupNorm convert its input and back: slower than NCHW.
    fused = not unsupported_reasons([torch.empty(1, dtype=dtype, device=device)])
    preferred = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    is_nvidia = torch.version.hip is None
    if is_nvidia and torch.cuda.get_device_capability(device) == CUDNN_ATTENTION_CAPABILITY:
        preferred.insert(0, SDPBackend.CUDNN_ATTENTION)
    return EnginePlan(
        channels_last=fused,
        fused_kernels=fused,
        upsampling="measured",
        attention_backends=tuple(preferred),
        graphs=True,
    )


class FastestChoice:
    """Runs the fastest of several equal computations, measured once for each key."""

    _REPETITIONS = 3

    def __init__(self) -> None:
        self.names: dict[Hashable, str] = {}

    def run(self, key: Hashable, candidates: Mapping[str, Callable[[], Tensor]]) -> Tensor:
        """Run a candidate; the first one where there is nothing to measure."""
        if key not in self.names and not torch.cuda.is_current_stream_capturing():
            seconds = {name: self._measure(run) for name, run in candidates.items()}
            self.names[key] = min(seconds, key=seconds.__getitem__)
        return candidates[self.names.get(key, next(iter(candidates)))]()

    def _measure(self, run: Callable[[], Tensor]) -> float:
        try:
            run()  # compiles, loads and allocates
        except RuntimeError:
            # This GPU has no such implementation, or not the memory for it.
            return math.inf
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(self._REPETITIONS):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
