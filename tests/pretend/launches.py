"""Triton on a device that is not there: launches are checked, not run."""

import ast
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, MockTensor, create_function_from_signature

from .tensors import KEYS, PretendDevice, PretendTensor, inner_of
from .values import mapped, on_meta, repeat, tensors_in, where


class Pointer(MockTensor):
    """What Triton looks at of a tensor: its type, and how its address is aligned."""

    def __init__(self, x: Tensor) -> None:
        super().__init__(x.dtype, list(x.shape))
        self._address = 512 + x.storage_offset() * x.element_size()

    def data_ptr(self) -> int:
        return self._address


class Triton:
    """Takes the place of `JITFunction.run` and of the package's operations.

    Args:
        device: Where kernels are launched.
        capability: For which variants are counted.
        failure: Raised by every launch, where Triton is installed and does not work.
    """

    def __init__(
        self, device: PretendDevice, capability: tuple[int, int], failure: Exception | None
    ) -> None:
        self.device = device
        self.failure = failure
        self.variants: set[tuple[str, str]] = set()
        self._backend = make_backend(GPUTarget("cuda", 10 * capability[0] + capability[1], 32))
        self._binders: dict[JITFunction, Callable] = {}
        self._is_in_operation = False

    def run(self, kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        """Check a launch."""
        if self.failure is not None:
            raise self.failure
        name = kernel.fn.__name__
        named = {key: kwargs[key] for key in kernel.arg_names if key in kwargs}
        given = dict(zip(kernel.arg_names, args, strict=False)) | named
        tensors = {key: value for key, value in given.items() if isinstance(value, Tensor)}
        for key, value in tensors.items():
            # As Triton itself says of a pointer that its driver does not know.
            assert isinstance(value, PretendTensor), f"{name}: {key} is on {value.device}"
            place = value.device.index
            assert place == self.device.current, f"{name}: {key} on {place}, not on the current GPU"
        if kernel not in self._binders:
            binder = create_function_from_signature(kernel.signature, kernel.params, self._backend)
            self._binders[kernel] = binder
        bind = self._binders[kernel]
        _, specialization, options = bind(*mapped(Pointer, args), **mapped(Pointer, kwargs))
        self.variants.add((name, f"{specialization} {options}"))
        grid = grid(given) if callable(grid) else grid
        sides = (*grid, 1, 1)[:3]
        assert 0 < sides[0] < 2**31, f"{name}: a grid of {grid}"
        assert all(0 < side < 2**16 for side in sides[1:]), f"{name}: a grid of {grid}"
        read, written = places_of(kernel)
        for key, value in tensors.items():
            if self.device.has_values and value.is_floating_point() and key in read - written:
                assert not value.inner.isnan().all(), (
                    f"{name} reads {key}, which nobody has written"
                )
        is_real = not any(value.inner.is_meta for value in tensors.values())
        if is_real and not self._is_in_operation:
            InterpretedFunction(kernel.fn)[grid](**mapped(inner_of, given))
        elif is_real:
            # The operation's reference gives the values; here it counts that there are some.
            for key in written & set(tensors):
                if tensors[key].is_floating_point():
                    tensors[key].inner.nan_to_num_()
        self.device.launches[f"triton {name}"] += 1
        self.device.count_bytes(*(x.inner for x in tensors.values()))

    def operation(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run one of the package's operations as on the device, with the reference's values."""
        device, num_before = self.device, sum(self.device.launches.values())
        steps, device.recording = device.recording, None
        self._is_in_operation = True
        try:
            with device:
                result = func.redispatch(KEYS[device.kind], *args, **kwargs)
        finally:
            device.recording = steps
            self._is_in_operation = False
        assert sum(device.launches.values()) > num_before, f"{func} launches nothing"
        outs = [x.inner for x in tensors_in(result)]
        key = repr((func, mapped(_look_of, args), mapped(_look_of, kwargs)))
        if key not in _FAKES:
            fake = tensors_in(func(*mapped(lambda x: on_meta(inner_of(x)), args), **kwargs))
            _FAKES[key] = [_look_of(x) for x in fake]
        found = [_look_of(x) for x in outs]
        assert found == _FAKES[key], f"{func}: register_fake says {_FAKES[key]}, not {found}"
        if device.has_values:
            for out in outs:
                is_written = out.dtype == torch.uint8 or not out.isnan().all()
                assert is_written, f"{func}: a result that no kernel writes, at {where()}"
            inner = mapped(inner_of, args)
            repeat(func, inner, kwargs, outs)
            if steps is not None:
                steps.append(lambda: repeat(func, inner, kwargs, outs))
        return result


_FAKES: dict[str, list[object]] = {}
"""What `register_fake` says of results, by the looks of arguments."""


def _look_of(x: Tensor) -> tuple[object, ...]:
    return (*x.shape, x.stride(), x.dtype)


@functools.cache
def places_of(kernel: JITFunction) -> tuple[frozenset[str], frozenset[str]]:
    """Return the parameters of a kernel that it reads from, and those that it writes to."""
    body = ast.parse(kernel.src).body[0]
    origins: dict[str, set[str]] = {p.arg: {p.arg} for p in body.args.args}
    read: set[str] = set()
    written: set[str] = set()

    def origin(node: ast.AST) -> set[str]:
        names = (n.id for n in ast.walk(node) if isinstance(n, ast.Name))
        return set().union(*(origins.get(name, set()) for name in names))

    def call(node: ast.Call) -> None:
        callee = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if callee in ("load", "store") and isinstance(node.func, ast.Attribute):
            (read if callee == "load" else written).update(origin(node.args[0]))
        inner = kernel.fn.__globals__.get(callee)
        if isinstance(inner, JITFunction):
            for found, target in zip(places_of(inner), (read, written), strict=True):
                for name, argument in zip(inner.arg_names, node.args, strict=False):
                    if name in found:
                        target.update(origin(argument))

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            visit(child)
        if isinstance(node, ast.Call):
            call(node)
        if isinstance(node, ast.Assign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            is_loaded = isinstance(node.value, ast.Call) and "load" in ast.dump(node.value.func)
            found = set() if is_loaded else origin(node.value)
            for name in (
                n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)
            ):
                before = origins.get(name, set()) if isinstance(node, ast.AugAssign) else set()
                origins[name] = before | found

    visit(body)
    return frozenset(read), frozenset(written)
