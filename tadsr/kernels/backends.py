"""Which implementation of an operation runs: a Triton kernel, or the reference in torch."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tadsr.errors import TADSRWarning
from tadsr.locks import Lock

Backend = Literal["triton", "reference"]
"""An implementation by name."""

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MIN_CAPABILITY = (7, 5)
"""Oldest CUDA compute capability that the kernels are compiled for in the tests."""

SWITCH = "TADSR_KERNELS"
"""Environment variable that leaves the kernels out where it is 0."""

_MAX_REASON = 200
_failures: dict[torch.device, str | None] = {}
"""Why kernels do not run on a device, None where they do; found when they are first wanted."""
_probing = Lock()

library = torch.library.Library("tadsr", "FRAGMENT")
"""Where the operations are registered, as `torch.ops.tadsr.<name>`."""


def register(
    schema: str, *, plan: str, reference: Callable[..., Any], fake: Callable[..., Any]
) -> None:
    """Register an operation, whose kernel or reference computes it.

    Args:
        schema: Name, arguments and results.
        plan: Module and function in `tadsr.kernels.gpu`, which needs Triton: from the arguments to
            empty results and the launches that fill them.
        reference: The same in torch.
        fake: From the arguments to results as the kernel lays them out.
    """
    name = schema.partition("(")[0]
    library.define(schema)

    def run(x: Tensor, *arguments: object) -> Any:
        if not uses_triton((x,)):
            return reference(x, *arguments)
        from tadsr.kernels.gpu.launch import run_plan

        module, _, function = plan.partition(".")
        planned = getattr(importlib.import_module(f"tadsr.kernels.gpu.{module}"), function)
        return run_plan(planned(x, *arguments), x.device)

    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tadsr::{name}", fake, lib=library)


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


def run_fastest(
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
    tensors: Sequence[Tensor | None],
    arguments: Sequence[Any],
    backend: Backend | None = None,
    other_reasons: Sequence[str] = (),
) -> Any:
    """Run a kernel where it can run, else the reference; also where it turns out not to.

    Args:
        kernel: The registered operation.
        reference: The same in torch.
        tensors: As for `uses_triton`.
        arguments: Of both.
        backend: As for `uses_triton`.
        other_reasons: As for `uses_triton`.
    """
    if not uses_triton(tensors, backend, other_reasons):
        return reference(*arguments)
    try:
        return kernel(*arguments)
    except Exception as error:
        if backend is not None or isinstance(error, torch.OutOfMemoryError):
            raise
        disable_kernels(tensors[0].device, error)
    return reference(*arguments)


def disable_kernels(device: torch.device, reason: BaseException | str) -> None:
    """Leave a device to the references from now on, and warn why.

    Args:
        device: Where a kernel failed or was wrong.
        reason: What happened.
    """
    if isinstance(reason, BaseException):
        first_line = str(reason).strip().partition("\n")[0]
        reason = f"{type(reason).__name__}: {first_line[:_MAX_REASON]}".removesuffix(": ")
    _failures[device] = reason
    warnings.warn(
        f"the fused kernels do not run on {device} ({reason}), so that torch computes the same "
        "there, slower. Triton needs a C compiler, Python's headers and the GPU's driver; where "
        "they are there, please report this with what `tadsr doctor --check --json` prints. "
        f"{SWITCH}=0 leaves the kernels out without this warning",
        TADSRWarning,
        stacklevel=2,
    )


def failure_on(device: torch.device) -> str | None:
    """Return why kernels do not run on a device; one runs on it when this is first asked.

    A package that is installed need not work: the first launch compiles for the machine.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    with _probing:
        if device not in _failures and device.type != "meta":
            _failures[device] = None
            try:
                _probe(device)
            except Exception as error:
                disable_kernels(device, error)
        return _failures.get(device)


def _probe(device: torch.device) -> None:
    """Raise unless a kernel compiles, runs and is right."""
    from tadsr.kernels.geglu import reference
    from tadsr.kernels.gpu.geglu import plan_geglu
    from tadsr.kernels.gpu.launch import run_plan

    x = torch.linspace(-3, 3, 64, device="cpu").view(2, 32)
    found = run_plan(plan_geglu(x.to(device)), device)
    if not torch.allclose(found.cpu(), reference(x), atol=1e-4):
        raise RuntimeError("a first kernel gives wrong values")


def unsupported_reasons(tensors: Sequence[Tensor | None]) -> list[str]:
    """Return why Triton kernels cannot compute with tensors; nothing if they can."""
    given = [tensor for tensor in tensors if tensor is not None]
    device = given[0].device
    reasons = []
    if not _has_triton():
        reasons.append("triton is not installed")
    elif os.environ.get(SWITCH) == "0":
        reasons.append(f"{SWITCH} is 0")
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
    if not reasons and (failure := failure_on(device)) is not None:
        reasons.append(f"kernels do not run on {device} ({failure})")
    return reasons


def is_interpreted() -> bool:
    """Return whether Triton's interpreter runs the kernels, on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
