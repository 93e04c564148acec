"""Load the published tagger, RAM's weights with the DAPE adapter merged, and write it anew."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tadsr.checkpoints.detect import locate
from tadsr.checkpoints.hub import download
from tadsr.checkpoints.json_files import read_json, user_path
from tadsr.checkpoints.ram_weights import RamWeights, read_ram
from tadsr.checkpoints.save import check_target, write_atomically
from tadsr.checkpoints.tensor_files import TensorReader, load_strict
from tadsr.errors import CheckpointError
from tadsr.named_files import read_text
from tadsr.prompts.tagger import Tagger, TaggerConfig, TaggerView, usual_dtype

TAGGER_FILE = "ram_swin_large_14m.pth"
TAGGER_ADAPTER_FILE = "DAPE.pth"
TAG_LIST_FILE = "ram_tag_list.txt"
THRESHOLDS_FILE = "ram_tag_list_threshold.txt"
CONVERTED_FILE = "tagger.safetensors"
CONVERTED_CONFIG = "tagger.json"
PUBLISHED_TAGGERS = {"dape": TAGGER_ADAPTER_FILE, "ram": None}
"""Names of the taggers whose files lie beside a published checkpoint's, and their adapters."""

_CALLABLE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def open_tagger(
    tagger: str | Path | Callable[[Any], str] | None,
    checkpoint: str | Path | None = None,
    **options: Any,
) -> Callable[[Any], str] | None:
    """Return the tagger that a user names.

    Args:
        tagger: A callable from a PIL image to a text, taken as it is; "dape" for the published
            tagger beside the checkpoint's files, "ram" for the same without its adapter; a folder
            or hub id that holds it; "module:name" for a callable of a module; None for none.

    Returns:
        The tagger, or None.
    """
    if tagger is None or callable(tagger):
        return tagger
    if not isinstance(tagger, str | Path):
        raise TypeError(
            "tagger must be 'dape', 'ram', a folder, a hub id, 'module:name', or a callable from "
            f"an image to a text, got {type(tagger).__name__}"
        )
    if tagger in PUBLISHED_TAGGERS:
        if checkpoint is None:
            raise ValueError(
                f"tagger {tagger!r} must lie beside a checkpoint, but none is given; name the "
                "folder or hub id that holds its files"
            )
        return load_tagger(checkpoint, **{"adapter": PUBLISHED_TAGGERS[tagger]} | options)
    if isinstance(tagger, str) and _CALLABLE.fullmatch(tagger):
        return _import_callable(tagger)
    return load_tagger(tagger, **options)


def load_tagger(
    source: str | Path,
    *,
    adapter: str | Path | None = TAGGER_ADAPTER_FILE,
    lists: str | Path | None = None,
    view: TaggerView = "enlarged",
    config: TaggerConfig | None = None,
    device: torch.device | str = "cpu",
    torch_dtype: torch.dtype | None = None,
    **hub: Any,
) -> Tagger:
    """Load RAM with the DAPE adapter, from the published or the converted files.

    The published ones are ram_swin_large_14m.pth, DAPE.pth, ram_tag_list.txt and
    ram_tag_list_threshold.txt. Files are read as data only; of RAM only what tagging needs.

    Args:
        source: A folder, also one of `convert_tagger`, or a hub id.
        adapter: The adapter, an absolute path or a name within the folder; None for RAM as it is.
            Converted files have theirs merged and take no other.
        lists: Folder of the two lists, where they do not lie beside the weights.
        view: What the tagger sees of an image: "enlarged", as in TADSR's published code, or
            "whole", as in RAM's.
        config: Sizes of the network, of published files only; None for the published ones.
        device: Where to load it.
        torch_dtype: Floating dtype of the weights; None for float16 on CUDA, as the published
            code has it, and float32 elsewhere.
        **hub: `revision`, `cache_dir`, `local_files_only` and `token`, as in `load_checkpoint`.

    Returns:
        The tagger, in eval mode.

    Raises:
        CheckpointError: A file is missing, damaged, unsafe or does not fit.
    """
    files = _find_files(source, adapter, lists, hub)
    weights = _read_weights(files, adapter, config)
    tags, thresholds = _read_lists(files, weights.config.num_tags)
    device = torch.device(device)
    dtype = torch_dtype or usual_dtype(device)
    # Copied out of the large file, which must not stay mapped.
    change = None if files.is_converted else lambda name, tensor: tensor
    load_strict(weights.network, weights, dtype=dtype, change=change)
    return Tagger(weights.network, tags, thresholds, view).eval().to(device)


def convert_tagger(
    source: str | Path,
    out: str | Path,
    *,
    adapter: str | Path | None = TAGGER_ADAPTER_FILE,
    lists: str | Path | None = None,
    config: TaggerConfig | None = None,
    torch_dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    **hub: Any,
) -> Path:
    """Write the tagging part of RAM as safetensors, its adapter merged, beside its tag lists.

    What is not listed here is as for `load_tagger`.

    Args:
        out: The folder to write, for `load_tagger`.
        torch_dtype: Floating dtype of the written weights.
        overwrite: Whether a folder that exists is replaced.

    Returns:
        The folder.

    Raises:
        CheckpointError: The source cannot be read, or the folder not written.
    """
    check_target(Path(out), overwrite)  # before minutes of loading
    files = _find_files(source, adapter, lists, hub)
    weights = _read_weights(files, adapter, config)
    _read_lists(files, weights.config.num_tags)
    tensors = {name: weights.state[name].to(torch_dtype) for name in weights.expected}
    facts = {"adapter": weights.adapter, "network": asdict(weights.config)}
    with write_atomically(Path(out), overwrite) as folder:
        save_file(tensors, folder / CONVERTED_FILE, metadata={"format": "pt"})
        text = json.dumps(facts, indent=2) + "\n"
        (folder / CONVERTED_CONFIG).write_text(text, encoding="utf-8")
        shutil.copyfile(files.tags, folder / TAG_LIST_FILE)
        shutil.copyfile(files.thresholds, folder / THRESHOLDS_FILE)
    return Path(out)


@dataclass(frozen=True)
class _Files:
    """A tagger's files; the adapter is None where it is merged already, or not wanted."""

    weights: Path
    adapter: Path | None
    tags: Path
    thresholds: Path

    @property
    def is_converted(self) -> bool:
        return self.weights.name == CONVERTED_FILE


def _find_files(
    source: str | Path, adapter: str | Path | None, lists: str | Path | None, hub: Mapping[str, Any]
) -> _Files:
    def needed(names: Sequence[str]) -> list[str]:
        """Choose from what a repository holds."""
        if CONVERTED_FILE in names:
            weights = [CONVERTED_FILE, CONVERTED_CONFIG]
        else:
            is_local = adapter is None or user_path(adapter).is_absolute()
            weights = [TAGGER_FILE] if is_local else [TAGGER_FILE, str(adapter)]
        return weights if lists is not None else [*weights, TAG_LIST_FILE, THRESHOLDS_FILE]

    folder = locate(source) or download(str(source), names=needed, **hub)
    is_converted = (folder / CONVERTED_FILE).is_file()
    place = folder if lists is None else user_path(lists)
    files = _Files(
        folder / (CONVERTED_FILE if is_converted else TAGGER_FILE),
        None if adapter is None or is_converted else folder / user_path(adapter),
        place / TAG_LIST_FILE,
        place / THRESHOLDS_FILE,
    )
    paths = (files.weights, files.tags, files.thresholds, files.adapter)
    missing = [str(p) for p in paths if p is not None and not p.is_file()]
    if missing:
        raise CheckpointError(
            f"the tagger needs {', '.join(missing)}, but {len(missing)} of its files are missing; "
            "the weights are published with TADSR, and the two lists with the Recognize Anything "
            "Model, in ram/data: copy all into one folder, or name the lists' own"
        )
    return files


def _read_weights(
    files: _Files, adapter: str | Path | None, config: TaggerConfig | None
) -> RamWeights:
    if not files.is_converted:
        weights = RamWeights(files.weights, config or TaggerConfig(), read_ram(files.weights))
        if files.adapter is not None:
            weights.merge(files.adapter)
        return weights
    path = files.weights.with_name(CONVERTED_CONFIG)
    facts = read_json(path)
    try:
        config, merged = TaggerConfig(**facts["network"]), facts["adapter"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path} must describe a tagger's network: {error!r}") from error
    if str(adapter) not in (TAGGER_ADAPTER_FILE, str(merged)):
        raise CheckpointError(
            f"{files.weights} has {merged or 'no adapter'} merged for good, but {adapter} was "
            "asked for: convert the published files again with it"
        )
    weights = RamWeights(files.weights, config, dict(TensorReader([files.weights]).items()))
    weights.adapter = merged
    return weights


def _read_lists(files: _Files, num_tags: int) -> tuple[list[str], list[float]]:
    lines = _read_lines(files.thresholds, num_tags)
    try:
        thresholds = [float(line) for line in lines]
    except ValueError as error:
        raise CheckpointError(f"{files.thresholds} must hold one number a line: {error}") from error
    return _read_lines(files.tags, num_tags), thresholds


def _import_callable(named: str) -> Callable[[Any], str]:
    module_name, _, name = named.partition(":")
    sys.path.insert(0, os.getcwd())  # an installed command looks for modules elsewhere
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"tagger {named!r} must be a module and a name in it: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not callable(found):
        raise ValueError(f"tagger {named!r} must be callable, got {type(found).__name__}")
    return found


def _read_lines(path: Path, count: int) -> list[str]:
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    lines = [line.strip() for line in lines if line.strip()]
    if len(lines) != count:
        raise CheckpointError(
            f"{path} must have {count} lines, one per tag of the network, got {len(lines)}"
        )
    return lines
