"""Load a checkpoint of any format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from tadsr.checkpoints.adapter_files import load_adapters
from tadsr.checkpoints.checkpoint import Checkpoint
from tadsr.checkpoints.components import (
    build_on_meta,
    clip_common_name,
    find_components,
    load_scheduler,
    load_tokenizer,
    open_weights,
)
from tadsr.checkpoints.detect import (
    detect_format,
    find_adapter,
    is_run_checkpoint,
    locate,
    read_metadata,
)
from tadsr.checkpoints.hub import download
from tadsr.checkpoints.layout import Format
from tadsr.checkpoints.tensor_files import load_strict
from tadsr.errors import CheckpointError
from tadsr.networks.adapters import attach_adapters, check_adapters, fuse_adapters, weight_changes

_NETWORKS = ("unet", "vae", "text_encoder", "prompt_embeddings")


def load_checkpoint(
    source: str | Path,
    *,
    adapter: str | Path | None = None,
    variant: str | None = None,
    torch_dtype: torch.dtype | Literal["auto"] | None = None,
    merge_adapters: bool = True,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Checkpoint:
    """Load a checkpoint from the package, a folder or the hub.

    Args:
        source: "tadsr-tiny", a folder in the native or published format, a checkpoint of a
            training run, or a hub id "owner/name".
        adapter: The adapters' file, where it is not inside `source`: tadsr.pkl or
            adapters.safetensors. On a native checkpoint it replaces the adapters kept apart, or
            is added to merged ones.
        variant: Weight files' variant, such as "fp16"; None takes the plain ones, or the only
            variant there is.
        torch_dtype: Floating dtype of the weights; None means float32, "auto" the stored dtype.
        merge_adapters: Merge adapters into the weights, in float32 before the cast to
            `torch_dtype`; otherwise attach them unmerged.
        revision: Branch, tag or commit on the hub.
        cache_dir: The hub's cache; None for its usual place.
        local_files_only: Use only what the hub's cache has.
        token: The hub's access token.

    Returns:
        The parts, on the CPU, in eval mode, without gradients.

    Raises:
        CheckpointError: Nothing is there, or it is damaged, unsafe or does not fit together.
        TypeError: `torch_dtype` is no floating dtype.
    """
    dtype = _resolve_dtype(torch_dtype)
    folder = locate(source) or download(
        str(source),
        adapter=adapter,
        variant=variant,
        revision=revision,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        token=token,
    )
    if is_run_checkpoint(folder):
        return _load_run(folder, dtype, merge_adapters)
    fmt = detect_format(folder)
    path = find_adapter(folder, fmt, adapter)
    parts = load_parts(folder, fmt, path, variant=variant, dtype=dtype, merge=merge_adapters)
    metadata = read_metadata(folder, fmt)
    return Checkpoint(**parts, format=fmt.name, source=str(source), metadata=metadata)


def load_parts(
    folder: Path,
    fmt: Format,
    adapter: Path | None = None,
    *,
    vae: nn.Module | None = None,
    variant: str | None = None,
    dtype: torch.dtype | None = torch.float32,
    merge: bool = True,
) -> dict[str, Any]:
    """Load a folder's parts by their names in `Checkpoint`; `vae` takes the place of its own."""
    present = find_components(folder, fmt)
    parts: dict[str, Any] = {"scheduler": load_scheduler(folder, present["scheduler"]), "vae": vae}
    names = [n for n in _NETWORKS if n in present and parts.get(n) is None]
    readers = {n: open_weights(folder, present[n], fmt, variant) for n in names}
    models = {n: build_on_meta(folder, present[n], readers[n]) for n in names}
    adapters = None if adapter is None else load_adapters(adapter)
    changes: dict[str, Any] = {}
    if adapters is not None:
        try:
            check_adapters(models["unet"], models["vae"], adapters)
        except ValueError as error:
            raise CheckpointError(f"{adapter} does not fit {folder}: {error}") from error
        if merge:
            changes = dict(zip(("unet", "vae"), weight_changes(adapters), strict=True))
    for name, model in models.items():
        rename = clip_common_name if name == "text_encoder" else None
        parts[name] = load_strict(
            model, readers.pop(name), dtype=dtype, rename=rename, change=changes.get(name)
        )
    if "tokenizer" in present and "text_encoder" in parts:
        parts["tokenizer"] = load_tokenizer(folder, present["tokenizer"], parts["text_encoder"])
    if adapters is not None and not merge:
        attach_adapters(parts["unet"], parts["vae"], adapters)
        for name in ("unet", "vae"):
            parts[name].requires_grad_(False).eval()
        parts["adapters"] = adapters
    return parts


def _load_run(folder: Path, dtype: torch.dtype | None, merge: bool) -> Checkpoint:
    from tadsr.checkpoints.base import load_run_checkpoint  # loads what the run started from

    checkpoint = load_run_checkpoint(folder)
    if merge and checkpoint.adapters is not None:
        fuse_adapters(checkpoint.unet, checkpoint.vae)
        checkpoint = replace(checkpoint, adapters=None)
    for part in (checkpoint.unet, checkpoint.vae, checkpoint.text_encoder):
        if part is not None:
            part.to(dtype)
    return checkpoint


def _resolve_dtype(torch_dtype: torch.dtype | str | None) -> torch.dtype | None:
    if torch_dtype is None:
        return torch.float32
    if torch_dtype == "auto":
        return None
    if not isinstance(torch_dtype, torch.dtype) or not torch_dtype.is_floating_point:
        raise TypeError(
            f"torch_dtype must be a floating torch.dtype, 'auto' or None, got {torch_dtype!r}"
        )
    return torch_dtype
