"""Read tensor files safely and load them into models, strictly and with little memory."""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tadsr.checkpoints.json_files import AGAIN, check_file
from tadsr.errors import CheckpointError

NUM_NAMES_SHOWN = 5
# Pages of a mapped file stay resident until the mapping goes; reopening this often bounds them.
_REOPEN_BYTES = 128 * 2**20
_MAX_OBJECTS_BYTES = 4 * 2**20
"""Most that a torch file may say about its tensors; objects take fifty times that in memory."""
_MAX_SHARED_TUPLES = 16
"""Tuples that stand in several places; torch writes none. Each may double the time of hashing."""
_LEGACY_PICKLES = 4
"""How many pickles a file before torch 1.6 begins with: the last has the tensors' names."""
_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

TensorMeta = tuple[torch.Size, torch.dtype]
Rename = Callable[[str], str | None]
"""From a name in the file or in the model to a common one; None drops a tensor of the file."""
Change = Callable[[str, Tensor], Tensor]


def read_pickle(path: Path) -> Any:
    """Read a torch pickle that holds data only; code in it is refused, never run."""
    check_file(path)
    head = _head(path)
    is_zip = head.startswith(b"PK")
    if not is_zip and not head.startswith(b"\x80"):
        found = _describe(head) or f"it starts with {head[:8]!r}"
        raise CheckpointError(f"{path} must be a torch file, but {found}; {AGAIN}")
    if is_zip:
        _check_zip(path)
    else:
        with path.open("rb") as file:
            _check_objects(path, file, _LEGACY_PICKLES)
    try:
        # Only the zip layout can be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        reason = str(error)
        if any(word in reason for word in ("nsupported", "not an allowed", "unrecognized")):
            raise CheckpointError(
                f"{path} was refused for safety: it holds code or objects besides tensors, which "
                "could do anything on this machine; get the weights as .safetensors"
            ) from error
        raise CheckpointError(f"{path} is damaged: {reason.splitlines()[0]}; {AGAIN}") from error
    except Exception as error:  # whatever the data makes torch stumble over
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is damaged: {reason}; {AGAIN}") from error


def _check_zip(path: Path) -> None:
    """Raise CheckpointError for a small file that would take much memory or time."""
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise CheckpointError(
                        f"{path} must hold tensors as torch saves them, but its part "
                        f"{entry.filename[:80]} is compressed; get the weights as .safetensors"
                    )
                if entry.filename.endswith(".pkl"):
                    with archive.open(entry) as file:
                        # In memory: each step asks where it stands, which a zip answers slowly.
                        _check_objects(path, io.BytesIO(file.read()))
    except CheckpointError:
        raise
    except Exception:  # torch says what is damaged
        return


def _check_objects(path: Path, file: IO[bytes], num_pickles: int = 1) -> None:
    tuples, is_tuple, num_shared = set(), False, 0
    with suppress(ValueError):  # torch says what is damaged
        for _ in range(num_pickles):
            for opcode, argument, position in pickletools.genops(file):
                if is_tuple and "PUT" in opcode.name:
                    tuples.add(argument)
                num_shared += "GET" in opcode.name and argument in tuples
                is_tuple = "TUPLE" in opcode.name
                if position > _MAX_OBJECTS_BYTES or num_shared > _MAX_SHARED_TUPLES:
                    raise CheckpointError(
                        f"{path} must hold tensors as torch saves them, but describes them in more "
                        f"than {_MAX_OBJECTS_BYTES} bytes or by tuples inside each other; get the "
                        "weights as .safetensors"
                    )


def check_tensors(state: Any, place: object) -> None:
    """Raise CheckpointError unless a part of a pickle holds plain tensors by name."""
    if not isinstance(state, Mapping) or not all(
        isinstance(n, str) and isinstance(t, Tensor) for n, t in state.items()
    ):
        raise CheckpointError(
            f"{place} must hold tensors by name, got {type(state).__name__} with other values"
        )
    for name, tensor in state.items():
        if (
            tensor.layout is not torch.strided
            or tensor.device.type != "cpu"
            or tensor.is_quantized
            or tensor.is_nested
            or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size()
        ):
            raise CheckpointError(
                f"{place} must hold tensors with their values, but {name} has none of its own; "
                "get the weights as .safetensors"
            )


class TensorReader:
    """Read named tensors from safetensors files and torch pickles."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self.meta: dict[str, TensorMeta] = {}
        self.metadata: dict[str, str] = {}
        self._pickles: dict[Path, Mapping[str, Tensor]] = {}
        self._names: dict[Path, list[str]] = {}
        for path in self.paths:
            is_safe = path.suffix == ".safetensors"
            meta = self._read_safetensors(path) if is_safe else self._read_pickle(path)
            twice = self.meta.keys() & meta.keys()
            if twice:
                raise CheckpointError(
                    f"shards must hold different tensors, but {path} repeats {sorted(twice)[:5]}"
                )
            self.meta.update(meta)
            self._names[path] = list(meta)

    @property
    def description(self) -> str:
        """The files, for messages."""
        first = str(self.paths[0])
        return first if len(self.paths) == 1 else f"{first} and {len(self.paths) - 1} more shards"

    def items(self, *, copy: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Iterate over names and tensors, file by file."""
        for path in self.paths:
            if path in self._pickles:
                yield from self._pickles[path].items()
                continue
            pending = list(self._names[path])
            while pending:
                num_bytes = 0
                with safe_open(path, framework="pt") as file:
                    while pending and not (copy and num_bytes > _REOPEN_BYTES):
                        name = pending.pop(0)
                        tensor = file.get_tensor(name)
                        num_bytes += tensor.nbytes
                        yield name, tensor
                        del tensor

    def _read_safetensors(self, path: Path) -> dict[str, TensorMeta]:
        check_file(path)
        try:
            with safe_open(path, framework="pt") as file:
                self.metadata.update(file.metadata() or {})
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                return {
                    name: (torch.Size(s.get_shape()), _SAFETENSORS_DTYPES[s.get_dtype()])
                    for name, s in slices.items()
                }
        except KeyError as error:
            raise CheckpointError(f"{path} holds the unsupported dtype {error}") from error
        except (SafetensorError, OSError, ValueError) as error:
            detail = _describe(_head(path)) or f"is damaged ({error})"
            raise CheckpointError(f"{path} must be safetensors, but {detail}; {AGAIN}") from error

    def _read_pickle(self, path: Path) -> dict[str, TensorMeta]:
        state = read_pickle(path)
        check_tensors(state, path)
        self._pickles[path] = state
        return {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}


def load_strict(
    model: nn.Module,
    reader: TensorReader,
    *,
    dtype: torch.dtype | None,
    rename: Rename | None = None,
    change: Change | None = None,
) -> nn.Module:
    """Give a model on the meta device its tensors; every name and shape must match."""
    # One at a time, and mapped from the file where neither cast nor changed: memory for one model.
    rename = rename or (lambda name: name)
    expected = model.state_dict()
    target = {rename(name): name for name in expected}
    to_model = {}
    for name in reader.meta:
        common = rename(name)
        if common is not None:
            to_model[name] = target.get(common, name)
    check_names(
        {to_model[n]: reader.meta[n][0] for n in to_model},
        {n: t.shape for n, t in expected.items()},
        reader.description,
        tried=type(model).__name__,
    )
    odd = [
        name
        for name, model_name in to_model.items()
        if reader.meta[name][1].is_floating_point != expected[model_name].is_floating_point()
    ]
    if odd:
        raise CheckpointError(
            f"{reader.description} must hold floats where {type(model).__name__} has them, but "
            f"{odd[0]} is {reader.meta[odd[0]][1]}"
        )
    loaded = {}
    dtypes = {reader.meta[name][1] for name in to_model}
    stored = {d for d in dtypes if d.is_floating_point}
    must_copy = change is not None or (dtype is not None and stored != {dtype})
    for name, tensor in reader.items(copy=must_copy):
        if name not in to_model:
            continue
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        changed = change(to_model[name], tensor) if change else tensor
        loaded[to_model[name]] = changed.to(wanted, copy=must_copy)
        del tensor, changed
    model.load_state_dict(loaded, strict=True, assign=True)
    _materialise_buffers(model)
    return model.requires_grad_(False).eval()


def check_names(
    found: Mapping[str, torch.Size], expected: Mapping[str, torch.Size], place: str, *, tried: str
) -> None:
    """Check that a file has exactly the expected tensors."""
    problems = {
        "missing": [n for n in expected if n not in found],
        "extra": [n for n in found if n not in expected],
        "misshapen": [
            f"{n} {tuple(found[n])} instead of {tuple(shape)}"
            for n, shape in expected.items()
            if n in found and found[n] != shape
        ],
    }
    if any(problems.values()):
        parts = [
            f"{len(names)} {kind} ({', '.join(names[:NUM_NAMES_SHOWN])}"
            f"{', …' if len(names) > NUM_NAMES_SHOWN else ''})"
            for kind, names in problems.items()
            if names
        ]
        raise CheckpointError(
            f"{place} must hold exactly the tensors of {tried}, but has {'; '.join(parts)}; tried "
            f"it as {tried} with the config beside it: check that file and config belong together"
        )


def _materialise_buffers(model: nn.Module) -> None:
    """Compute the buffers that no file holds; so far only CLIP's position ids."""
    for name, buffer in list(model.named_buffers()):
        if not buffer.is_meta:
            continue
        parent, _, leaf = name.rpartition(".")
        if leaf != "position_ids":
            raise CheckpointError(
                f"{type(model).__name__} must be rebuilt from its file, but its buffer {name} is "
                "not stored; this version of its library is not supported: please report it"
            )
        ids = torch.arange(buffer.shape[-1]).expand(buffer.shape)
        model.get_submodule(parent).register_buffer(leaf, ids, persistent=False)


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; {AGAIN}") from error


def _describe(head: bytes) -> str | None:
    """Guess what a file is that holds no tensors; None without a guess."""
    text = head.lstrip().lower()
    if text.startswith(b"<"):
        return "it is a web page saved under this name"
    if text.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer: run `git lfs pull`"
    if text.startswith((b"\x80", b"pk")):
        return "it is a torch pickle under this name"
    return None
