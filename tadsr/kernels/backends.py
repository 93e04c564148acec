"""Which implementation of an operation runs: a Triton kernel, or the reference in torch."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Backend = Literal["triton", "reference"]
"""An implementation by name."""

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MIN_CAPABILITY = (7, 5)
"""Oldest CUDA compute capability that the kernels are compiled for in the tests."""

library = torch.library.Library("tadsr", "FRAGMENT")
"""Where the operations are registered, as `torch.ops.tadsr.<name>`."""


def uses_triton(
    tensors: Sequence[Tensor | None],
    backend: Backend | None = None,
    other_reasons: Sequence[str] = (),
) -> bool:
    """Decide whether a Triton kernel computes with these tensors.

    Args:
        tensors: All tensors of the call, the activations first; None where one is left out.
        backend: A choice, or None for Triton wherever it can run.
        other_reasons: Why this very call has no kernel, none if it has one.

    Returns:
        Whether to run the kernel; else the reference.

    Raises:
        ValueError: `backend` is unknown, or is "triton" and cannot run here.
    """
    if backend == "reference":
        return False
    if backend is None:
        return not (other_reasons or unsupported_reasons(tensors))
    if backend != "triton":
        raise ValueError(
            f"backend must be None or one of {', '.join(get_args(Backend))}, got {backend!r}"
        )
    reasons = [*other_reasons, *unsupported_reasons(tensors)]
    if reasons:
        raise ValueError(
            f"the Triton kernel must be able to run, but {'; '.join(reasons)}; "
            "leave backend out to use the reference"
        )
    return True


def unsupported_reasons(tensors: Sequence[Tensor | None]) -> list[str]:
    """Return why Triton kernels cannot compute with tensors; nothing if they can."""
    given = [tensor for tensor in tensors if tensor is not None]
    device = given[0].device
    reasons = []
    if not _has_triton():
        reasons.append("triton is not installed")
    elif is_interpreted():
        pass
    elif device.type != "cuda" or torch.version.hip is not None:
        reasons.append(f"the tensors are on {device}, not on an NVIDIA GPU")
    elif torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        reasons.append(f"{device} is older than compute capability {MIN_CAPABILITY}")
    if any(tensor.device != device for tensor in given):
        reasons.append("the tensors are on several devices")
    if given[0].dtype not in KERNEL_DTYPES:
        reasons.append(f"{given[0].dtype} has no kernel")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        reasons.append("gradients are recorded and the kernels have no backward pass")
    return reasons


def is_interpreted() -> bool:
    """Return whether Triton's interpreter runs the kernels, on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
