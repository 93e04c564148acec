"""Find a checkpoint's folder from what the user names, and its format from its content."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from importlib import resources
from pathlib import Path
from typing import Any

from tadsr.checkpoints.json_files import read_json, user_path
from tadsr.checkpoints.layout import NATIVE, OFFICIAL, PUBLISHED_LICENCE, Format
from tadsr.errors import CheckpointError

EMBEDDED = ("tadsr-tiny",)
"""Checkpoints inside the installed package."""

SUMS_NAME = "SHA256SUMS"
PIPELINE_CLASS = "TADSRPipeline"
RUN_PROGRESS = "progress.json"
"""What a checkpoint of a training run has at its top, and no other checkpoint."""
_MOST_DEFAULTS = {"default_timestep": 10**6, "default_process_size": 2048}
"""Largest value of each number that a model may name as its default."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_sums(folder: Path) -> None:
    """Check the files of a checkpoint inside the package against the sums beside them."""
    for line in (folder / SUMS_NAME).read_text(encoding="utf-8").splitlines():
        digest, name = line.split(maxsplit=1)
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise CheckpointError(
                f"{path} must be the file that tadsr ships, but is missing or damaged; "
                "reinstall tadsr"
            )


def locate(source: str | Path) -> Path | None:
    """Return the folder of a checkpoint, or None for a hub id; what is embedded comes first."""
    name = str(source)
    if isinstance(source, str) and source in EMBEDDED:
        folder = Path(str(resources.files("tadsr"))) / "weights" / source
        if not folder.is_dir():
            raise CheckpointError(
                f"{source!r} must be installed at {folder}, but is missing; reinstall tadsr"
            )
        check_sums(folder)
        return folder
    path = user_path(source)
    if os.path.isdir(path):  # Path's own raise where a name is too long
        return path
    if os.path.isfile(path):
        raise CheckpointError(
            f"a model must be a folder, got the file {name}; give the folder of the base model, "
            "and adapters in a file of their own as adapter= (--adapter)"
        )
    if isinstance(source, str) and HUB_ID.fullmatch(source):
        return None
    close = difflib.get_close_matches(name, EMBEDDED, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else "check the spelling"
    raise CheckpointError(
        f"source must name a checkpoint, got {name!r}; looked for an embedded one "
        f"({', '.join(EMBEDDED)}), a folder {path.absolute()}, and a hub id 'owner/name'; {hint}"
    )


def is_run_checkpoint(folder: Path) -> bool:
    """Tell whether a folder is a checkpoint of a training run."""
    return (folder / RUN_PROGRESS).is_file()


def detect_format(folder: Path) -> Format:
    """Tell a checkpoint folder's format from its content."""
    index = folder / "model_index.json"
    class_name = None
    if index.is_file():
        class_name = read_json(index).get("_class_name")
        if class_name == PIPELINE_CLASS:
            return NATIVE
    if (folder / OFFICIAL.component("vae").folder).is_dir():
        return OFFICIAL
    if is_run_checkpoint(folder):
        raise CheckpointError(
            f"{folder} must hold whole networks, but is a checkpoint of a training run; make a "
            "model of it with `tadsr convert`"
        )
    present = ", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "nothing"
    reason = f" (its model_index.json is of {class_name})" if class_name else ""
    raise CheckpointError(
        f"{folder} must be a native checkpoint (model_index.json of {PIPELINE_CLASS}) or a "
        f"published one (time_vae/, unet/, ...), found {present}{reason}; plain Stable Diffusion "
        "has no time-aware encoder and cannot stand for either"
    )


def find_adapter(folder: Path, fmt: Format, adapter: str | Path | None) -> Path | None:
    """Find the file of the adapters: the named one, or the format's usual one, or None."""
    usual = folder / fmt.adapter_file
    if adapter is None:
        if usual.is_file():
            return usual
        if fmt is NATIVE:
            return None
        raise CheckpointError(
            f"{folder} is the base model of a published checkpoint, whose adapters are missing: "
            f"no {fmt.adapter_file} in it; give the file as adapter= (--adapter)"
        )
    named = user_path(adapter)
    names = (OFFICIAL.adapter_file, NATIVE.adapter_file)
    candidates = [named, *(named / name for name in names), folder / named]
    for candidate in candidates:
        if os.path.isfile(candidate):
            return candidate
    raise CheckpointError(
        f"adapter must be an existing file, got {adapter}; looked for "
        f"{', '.join(map(str, candidates))}"
    )


def check_source(source: str | Path, adapter: str | Path | None = None) -> None:
    """Check that a user's checkpoint can exist, before anything heavy is imported."""
    folder = locate(source)
    if folder is not None and not is_run_checkpoint(folder):
        find_adapter(folder, detect_format(folder), adapter)


def read_metadata(folder: Path, fmt: Format) -> dict[str, Any]:
    """Return the facts that travel with a checkpoint's weights."""
    if fmt is NATIVE:
        path = folder / "model_index.json"
        metadata = read_json(path).get("tadsr_metadata") or {}
        if not isinstance(metadata, dict):
            raise CheckpointError(f"{path} must have an object under tadsr_metadata")
        for name, most in _MOST_DEFAULTS.items():
            value = metadata.get(name, 0)
            if type(value) is not int or not 0 <= value <= most:
                raise CheckpointError(
                    f"{path} must have a whole number from 0 to {most} as {name}, got {value!r}"
                )
        return metadata
    return {"license": PUBLISHED_LICENCE}
