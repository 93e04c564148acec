"""Tensors of a device that is not there: they lie on the CPU, treated as strictly as on a GPU.

Every operation on them passes through `PretendDevice`, which computes it on the CPU, lays the
result out as CUDA would, counts what it costs, and raises what CUDA would raise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .values import mapped, on_meta, repeat, spoil, tensors_in, where

HALVES = (torch.float16, torch.bfloat16)
SMALL = 4096
"""Elements up to which values are kept where large tensors have none."""
MAP_CHANNELS = 8
"""Channels from which a change of memory layout counts as a hidden copy: pictures have fewer."""

_ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_FREE = {*_ALLOCATIONS, "detach", "alias", "lift_fresh", "_unsafe_view", "_reshape_alias"}
_LAUNCHES = {"native_group_norm": 3}
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
_SDP_ENABLED = {
    SDPBackend.FLASH_ATTENTION: torch._C._get_flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: torch._C._get_mem_efficient_sdp_enabled,
    SDPBackend.MATH: torch._C._get_math_sdp_enabled,
    SDPBackend.CUDNN_ATTENTION: torch._C._get_cudnn_sdp_enabled,
}


class PretendTensor(Tensor):
    """A tensor that says it is on the device.

    Args:
        inner: Its values on the CPU, or on meta where only shapes count.
        device: What it says.
    """

    @staticmethod
    def __new__(
        cls, inner: Tensor, device: torch.device | None = None, requires_grad: bool = False
    ) -> PretendTensor:
        if device is None:  # as accelerate makes a parameter of a parameter's class
            return inner.detach()
        return Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )

    def __init__(self, inner: Tensor, device: torch.device | None = None, **_: Any) -> None:
        if device is not None:
            self.inner = inner

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner}, device={self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        with torch.no_grad():
            copied = self.detach().clone()
        if isinstance(self, nn.Parameter):
            copied = nn.Parameter(copied, self.requires_grad)
        return memo.setdefault(id(self), copied)

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any, **__: Any) -> Any:
        raise RuntimeError(f"{func} on a pretend tensor outside of its device's context")


class PretendDevice(TorchDispatchMode):
    """Computes on the CPU what tensors of the device are asked for.

    Args:
        kind: "cuda" or "mps".
        has_values: Whether results are computed; otherwise large ones have shapes only, flags are
            true and numbers zero.
        total_bytes: Memory of the device.
    """

    def __init__(self, kind: str, has_values: bool, total_bytes: int) -> None:
        super().__init__()
        self.kind = kind
        self.has_values = has_values
        self.total_bytes = total_bytes
        self.current = 0
        self.recording: list[Callable[[], None]] | None = None
        self.recorded: list[Tensor] = []
        self.num_replays = 0
        self.live_bytes = self._sweep_at = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.pinned: dict[int, StorageWeakRef] = {}
        """Pinned memory by its address."""
        self._on_their_way: list[tuple[Tensor, Tensor]] = []
        self.forget()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is traced, and to say so takes a tenth of the time of an operation

    def forget(self) -> None:
        """Start counting anew."""
        self.launches: Counter[str] = Counter()
        self.moved_bytes = 0
        """What launches read and write."""
        self.pageable: list[str] = []
        """Copies from memory of the host that is not pinned, for which it waits."""
        self.waits: list[str] = []
        self.hidden_copies: list[str] = []
        self._sweep()

    def wait(self, why: str) -> None:
        """Have the host wait for the device, which ends all copies."""
        if self.recording is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {why}")
        self.waits.append(f"{why} at {where()}")
        self.finish_copies()

    def finish_copies(self, source: Tensor | None = None) -> None:
        """Fill the host's memory that the device has filled once it reads `source`, or now."""
        on_their_way, self._on_their_way = self._on_their_way, []
        for target, values in on_their_way:
            if source is None or target.untyped_storage() == source.untyped_storage():
                target.copy_(values)
            else:
                self._on_their_way.append((target, values))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = tensors_in(args, kwargs)
        own = [x for x in tensors if isinstance(x, PretendTensor)]
        name = func.overloadpacket.__name__
        target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if not own and (target is None or target.type != self.kind):
            return self._on_host(func, name, args, kwargs)
        if name == "is_pinned":
            return False
        if name in ("_local_scalar_dense", "is_nonzero"):
            self.wait(".item()")
            return self._read(args[0]).item()
        if name == "equal":
            self.launches[name] += 1
            self.wait("torch.equal")
            return torch.equal(*map(self._read, args))
        if name == "copy_" and not isinstance(args[0], PretendTensor):
            return self._to_host(
                args[1], args[0], kwargs.get("non_blocking") or args[2:] == (True,)
            )
        if name == "_to_copy" and target is not None and target.type == "cpu":
            return self._copied_to_host(args[0], kwargs)
        self._check_places(func, name, tensors, own)
        device = target or own[0].device
        if device.index is None:
            device = torch.device(device.type, self.current)
        if (name == "_to_copy" and not own) or (name == "copy_" and len(own) < len(tensors)):
            self._check_recordable(name, tensors)
            self.finish_copies(tensors[-1])
        if func.namespace == "tadsr":
            return self.run_operation(func, args, kwargs)
        return self._compute(func, name, args, kwargs, device)

    def run_operation(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run one of the package's own operations; replaced where Triton is."""
        with self:
            return func.redispatch(KEYS[self.kind], *args, **kwargs)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Run `F.scaled_dot_product_attention` by the implementation that CUDA would take."""
        size, is_half = query.shape[-1], query.dtype in HALVES
        is_dense = all(x.stride(-1) == 1 for x in (query, key, value))
        can_run = {
            SDPBackend.FLASH_ATTENTION: is_half and size <= 256 and is_dense and attn_mask is None,
            SDPBackend.CUDNN_ATTENTION: is_half and size % 8 == 0 and size <= 128 and is_dense,
            SDPBackend.EFFICIENT_ATTENTION: is_dense and size % (8 if is_half else 4) == 0,
            SDPBackend.MATH: True,
        }
        order = [SDPBackend(number) for number in torch._C._get_sdp_priority_order()]
        chosen = [b for b in order if can_run.get(b) and _SDP_ENABLED[b]()]
        if not chosen:
            raise RuntimeError("No available kernel. Aborting execution.")
        is_math = self.kind != "cuda" or chosen[0] == SDPBackend.MATH

        def run(*parts: Tensor) -> Tensor:
            query, key, value = (p.float() if p.dtype in HALVES else p for p in parts[:3])
            mask = parts[3] if len(parts) > 3 else None
            out = F.scaled_dot_product_attention(
                query, key, value, mask, 0.0, is_causal, scale=scale
            )
            out = out.to(parts[0].dtype)
            return out if is_math else out.transpose(1, 2).contiguous().transpose(1, 2)

        parts = [x for x in (query, key, value, attn_mask) if x is not None]
        self._check_places("attention", "attention", parts, parts)
        name = f"attention: {'MATH' if is_math else chosen[0].name}"
        _LAUNCHES.setdefault(name, 8 if is_math else 1)
        return self._compute(run, name, tuple(parts), {}, query.device)

    def _check_places(self, func: Any, name: str, tensors: list[Tensor], own: list) -> None:
        others = [x for x in tensors if not isinstance(x, PretendTensor) and x.dim()]
        places = {str(x.device) for x in own} | {str(x.device) for x in others}
        is_copy = name in ("copy_", "_to_copy") or (name in _INDEXING and own[0] is tensors[0])
        if len(places) > 1 and not is_copy:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{' and '.join(sorted(places))}! ({func})"
            )

    def count_bytes(self, *values: Tensor) -> None:
        """Count what a launch reads and writes."""
        self.moved_bytes += sum(x.numel() * x.element_size() for x in values)

    def _check_recordable(self, name: str, tensors: list[Tensor]) -> None:
        source = tensors[-1]
        if source.dim() and not self._is_pinned(source):
            self.pageable.append(f"{name} of {tuple(source.shape)} at {where()}")
        if self.recording is not None and source.dim() and not self._is_pinned(source):
            raise RuntimeError(
                f"operation not permitted when stream is capturing: {name} from host"
            )

    def _compute(
        self, func: Callable, name: str, args: tuple, kwargs: dict[str, Any], device: torch.device
    ) -> Any:
        if self.kind == "mps":
            self._check_mps(name, args, kwargs)
        own: dict[int, PretendTensor] = {}
        leaves: list[Tensor] = []

        def opened(x: Tensor) -> Tensor:
            inner = inner_of(x)
            leaves.append(inner)
            if inner is not x:
                own[id(inner)] = x
            return inner

        args, kwargs = mapped(opened, args), mapped(opened, kwargs)
        place = "cpu"
        if not self.has_values and (
            any(x.is_meta for x in leaves) or _num_elements(name, args, kwargs) > SMALL
        ):
            place = "meta"
            args, kwargs = mapped(on_meta, args), mapped(on_meta, kwargs)
        if kwargs.get("device") is not None:
            kwargs["device"] = place
        kwargs.pop("pin_memory", None)
        run = func
        if name == "convolution":
            self._check_convolution(*args[:3])
            run = _convolve
        result = run(*args, **kwargs)
        outs = tensors_in(result)
        is_view = getattr(func, "is_view", False) or name in _FREE
        if name in _ALLOCATIONS:
            for out in outs:
                spoil(out)
        elif not is_view:
            self._check_layout(name, leaves, outs)
            self.launches[name] += _LAUNCHES.get(name, 1)
            self.count_bytes(*leaves, *outs)
            if self.recording is not None and self.has_values:
                self.recording.append(lambda: repeat(run, args, kwargs, outs))
                self.recorded += [out for out in outs if id(out) not in own]
        for out in outs:
            self._take(out)

        return mapped(lambda x: own[id(x)] if id(x) in own else PretendTensor(x, device), result)

    def _check_convolution(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        layout = _convolved_layout(x, weight)
        for part, values in (("input", x), ("weight", weight)):
            is_map = values.shape[1] > MAP_CHANNELS
            if (
                is_map
                and not values.is_contiguous(memory_format=layout)
                and _layout(values) != layout
            ):
                self._hide(f"a convolution's {part} {tuple(values.shape)} to {layout}")
        if bias is not None:
            self.launches["convolution's bias"] += 1

    def _check_layout(self, name: str, leaves: list[Tensor], outs: list[Tensor]) -> None:
        if name not in ("clone", "_to_copy") or leaves[0].dim() != 4:
            return
        before, after = leaves[0], outs[0]
        if before.shape[1] > MAP_CHANNELS and _layout(before) != _layout(after):
            self._hide(f"{name} of {tuple(before.shape)}, {before.stride()} to {after.stride()}")

    def _hide(self, what: str) -> None:
        self.launches["hidden copy"] += 1
        self.hidden_copies.append(f"{what} at {where()}")

    def _check_mps(self, name: str, args: tuple, kwargs: dict[str, Any]) -> None:
        leaves = tensors_in(args, kwargs)
        if kwargs.get("dtype") == torch.float64 or any(x.dtype == torch.float64 for x in leaves):
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't"
            )
        if name == "_upsample_bicubic2d_aa":  # as torch before 2.7
            raise NotImplementedError(f"{name} is not implemented for the MPS device")

    def _on_host(self, func: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        if name == "is_pinned":
            return self._is_pinned(args[0])
        if name == "_pin_memory":
            return self._pin(args[0].clone())
        is_pinned = kwargs.pop("pin_memory", False)
        result = func(*args, **kwargs)
        return self._pin(result) if is_pinned else result

    def _pin(self, host: Tensor) -> Tensor:
        storage = host.untyped_storage()
        self.pinned[storage.data_ptr()] = StorageWeakRef(storage)
        return host

    def _is_pinned(self, host: Tensor) -> bool:
        known = self.pinned.get(host.untyped_storage().data_ptr())
        return known is not None and not known.expired()

    def _copied_to_host(self, source: PretendTensor, kwargs: dict[str, Any]) -> Tensor:
        dtype = kwargs.get("dtype") or source.dtype
        host = torch.empty_like(self._read(source), dtype=dtype)
        is_async = bool(kwargs.get("non_blocking"))
        return self._to_host(source, self._pin(host) if is_async else host, is_async)

    def _to_host(self, source: PretendTensor, host: Tensor, is_async: bool) -> Tensor:
        values = self._read(source).clone()
        if not (is_async and self._is_pinned(host)):
            self.wait("copy to the host")
            return host.copy_(values)
        self.launches["copy to pinned memory"] += 0
        self._on_their_way.append((host, values))
        spoil(host)  # until somebody waits
        return host

    def _read(self, x: Tensor) -> Tensor:
        inner = inner_of(x)
        if not inner.is_meta:
            return inner
        is_flag = inner.dtype == torch.bool
        return torch.full(inner.shape, is_flag, dtype=inner.dtype)

    def _take(self, out: Tensor) -> None:
        storage = out.untyped_storage()
        known = self._live.get(storage._cdata)
        if known is not None and not known[0].expired():
            return
        num_bytes = storage.nbytes()
        if self.live_bytes + num_bytes > min(self.total_bytes, self._sweep_at):
            self._sweep()
            self._sweep_at = 2 * (self.live_bytes + num_bytes)
        if self.live_bytes + num_bytes > self.total_bytes:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {num_bytes / 2**20:.2f} MiB."
            )
        if known is not None and storage._cdata in self._live:
            self.live_bytes -= known[1]
        self._live[storage._cdata] = (StorageWeakRef(storage), num_bytes)
        self.live_bytes += num_bytes

    def _sweep(self) -> None:
        for key in [key for key, (storage, _) in self._live.items() if storage.expired()]:
            self.live_bytes -= self._live.pop(key)[1]


_CHANGED = {
    *(F.scaled_dot_product_attention, torch.tensor, torch.bmm),
    *(Tensor.new_tensor, Tensor.tolist, Tensor.__getitem__),
}


class Functions(TorchFunctionMode):
    """What reaches no dispatcher: Python functions, and constructors that hide from it."""

    def __init__(self, device: PretendDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _CHANGED:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention and isinstance(args[0], PretendTensor):
            return self.device.attend(*args, **kwargs)
        if func is torch.tensor and kwargs.get("device") is not None:
            rest = {name: value for name, value in kwargs.items() if name != "device"}
            return func(*args, **rest).to(kwargs["device"])
        if func is Tensor.new_tensor and isinstance(args[0], PretendTensor):
            dtype = kwargs.get("dtype") or args[0].dtype
            return torch.tensor(args[1], dtype=dtype).to(args[0].device)
        if func is Tensor.tolist and isinstance(args[0], PretendTensor):
            self.device.wait(".tolist()")
            return self.device._read(args[0]).tolist()
        if func is Tensor.__getitem__ and isinstance(args[1], list):
            return func(args[0], torch.tensor(args[1]))
        if func is torch.bmm and kwargs.get("out_dtype") is not None:
            parts = (x.to(kwargs["out_dtype"]) for x in args)
            return func(*parts)
        return func(*args, **kwargs)


def generators(kind: str) -> type:
    """Return what takes the place of `torch.Generator`, whose device draws as the CPU does."""
    real = torch.Generator

    class Kind(type):
        def __call__(cls, device: Any = "cpu") -> torch.Generator:
            return real("cpu" if torch.device(device).type == kind else device)

        def __instancecheck__(cls, x: object) -> bool:
            return isinstance(x, real)

    return Kind("Generator", (), {})


def _convolved_layout(x: Tensor, weight: Tensor) -> torch.memory_format:
    # cuDNN's rule: one that is NHWC makes all NHWC.
    is_nhwc = torch.channels_last in (suggest_memory_format(x), suggest_memory_format(weight))
    return torch.channels_last if is_nhwc else torch.contiguous_format


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    wide = [v.float() if v is not None and v.dtype in HALVES else v for v in (x, weight, bias)]
    out = torch.ops.aten.convolution.default(*wide, *rest).to(x.dtype)
    return out.contiguous(memory_format=_convolved_layout(x, weight))


def inner_of(x: Tensor) -> Tensor:
    """Return what a tensor of the device is made of."""
    return x.inner if isinstance(x, PretendTensor) else x


def _num_elements(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """Return the elements of what an operation makes from no tensor of the device."""
    if name == "_to_copy":
        return args[0].numel()
    shape = args[0] if args and isinstance(args[0], list | tuple) else ()
    return int(torch.Size(shape).numel()) if all(isinstance(n, int) for n in shape) else 0


def _layout(x: Tensor) -> torch.memory_format:
    return suggest_memory_format(x)


KEYS = {
    kind: torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, kind.upper()))
    for kind in ("cuda", "mps")
}
