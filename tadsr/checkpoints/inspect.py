"""Describe a checkpoint from headers and configs alone, without building a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from tadsr.checkpoints.adapter_files import load_adapters
from tadsr.checkpoints.components import find_components, load_scheduler, open_weights
from tadsr.checkpoints.detect import detect_format, find_adapter, locate, read_metadata
from tadsr.checkpoints.hub import download
from tadsr.checkpoints.json_files import read_json, read_small
from tadsr.checkpoints.layout import NATIVE, PUBLISHED_LICENCE, Component, Format, list_weight_files
from tadsr.named_files import holds_something

NETWORK_SCALE = 4
"""Upscaling factor that the published networks are trained for."""


@dataclass(frozen=True)
class ComponentInfo:
    """Describe one component's files.

    Args:
        name: What the pipeline calls it.
        files: The weight files that loading would read, relative to the checkpoint.
        variants: Variants that exist; None stands for the plain files.
        num_parameters: Values in its tensors.
        num_bytes: Size of its weight files, in bytes.
        dtypes: Stored dtypes, such as ("float16",).
    """

    name: str
    files: tuple[str, ...] = ()
    variants: tuple[str | None, ...] = ()
    num_parameters: int = 0
    num_bytes: int = 0
    dtypes: tuple[str, ...] = ()


@dataclass(frozen=True)
class CheckpointInfo:
    """Describe a checkpoint.

    Args:
        source: What the user named.
        folder: Where it is.
        format: "native" or "official".
        components: Its parts.
        adapter_file: The adapters' file, or None where they are merged.
        num_adapter_parameters: Values in the adapters; 0 where merged.
        rank_unet: Rank of the UNet's LoRA matrices, or None where merged.
        rank_vae: Rank of the VAE's, or None where merged.
        lora_alpha: Numerator of the LoRA scaling, or None where merged.
        timestep_range: First and last timestep, both included.
        default_timestep: Where none is named, or None where the checkpoint does not say.
        default_process_size: Shorter side in px that smaller results are computed at, likewise.
        latent_channels: Channels of the latents.
        scale: Upscaling factor.
        prompts: The known prompts, or None where a text encoder takes any.
        licence: What the checkpoint says of its licence.
    """

    source: str
    folder: Path
    format: str
    components: tuple[ComponentInfo, ...]
    adapter_file: Path | None
    num_adapter_parameters: int
    rank_unet: int | None
    rank_vae: int | None
    lora_alpha: float | None
    timestep_range: tuple[int, int]
    default_timestep: int | None
    default_process_size: int | None
    latent_channels: int
    scale: int
    prompts: tuple[str, ...] | None
    licence: str

    @property
    def num_parameters(self) -> int:
        """Values in all components, adapters kept apart left out."""
        return sum(c.num_parameters for c in self.components)

    @property
    def num_bytes(self) -> int:
        """Size of all weight files and of the adapters, in bytes."""
        adapter = self.adapter_file.stat().st_size if self.adapter_file else 0
        return sum(c.num_bytes for c in self.components) + adapter


def inspect_checkpoint(source: str | Path, adapter: str | Path | None = None) -> CheckpointInfo:
    """Describe a checkpoint; a hub id is looked up in the cache only.

    A published base without adapters is described too, so that its files can be checked alone.

    What is not listed here is as for `load_checkpoint`.

    Returns:
        The description.

    Raises:
        CheckpointError: Nothing is there, or a header or config is damaged.
    """
    folder = locate(source) or download(
        str(source), adapter=adapter, needs_adapter=False, local_files_only=True
    )
    fmt = detect_format(folder)
    has_file = adapter is not None or (folder / fmt.adapter_file).is_file()
    adapter_file = find_adapter(folder, fmt, adapter) if has_file else None
    adapters = None if adapter_file is None else load_adapters(adapter_file)
    present = find_components(folder, fmt)
    schedule = load_scheduler(folder, fmt.component("scheduler"))
    vae_config = _config(folder, fmt.component("vae"))
    metadata = read_metadata(folder, fmt)
    return CheckpointInfo(
        source=str(source),
        folder=folder,
        format=fmt.name,
        components=tuple(_describe(folder, c, fmt) for c in present.values()),
        adapter_file=adapter_file,
        num_adapter_parameters=adapters.num_parameters if adapters else 0,
        rank_unet=adapters.rank_unet if adapters else None,
        rank_vae=adapters.rank_vae if adapters else None,
        lora_alpha=adapters.alpha if adapters else None,
        timestep_range=(0, schedule.config.num_train_timesteps - 1),
        default_timestep=metadata.get("default_timestep"),
        default_process_size=metadata.get("default_process_size"),
        latent_channels=vae_config.get("latent_channels", 4),
        scale=NETWORK_SCALE,
        prompts=_prompts(folder, present),
        licence=_licence(folder, fmt),
    )


def _config(folder: Path, component: Component) -> dict:
    return read_json(folder / component.folder / component.config)


def _describe(folder: Path, component: Component, fmt: Format) -> ComponentInfo:
    if not component.stems:
        return ComponentInfo(component.name)
    names = [p.name for p in (folder / component.folder).iterdir()]
    variants = {f.variant for f in list_weight_files(names, component) if f.suffix in fmt.suffixes}
    # With several variants and no plain files there is no default; the first one is described.
    ordered = sorted(variants, key=lambda v: v or "")
    variant = None if None in variants or not ordered else ordered[0]
    reader = open_weights(folder, component, fmt, variant)
    shapes, dtypes = zip(*reader.meta.values(), strict=True) if reader.meta else ((), ())
    return ComponentInfo(
        name=component.name,
        files=tuple(str(p.relative_to(folder)) for p in reader.paths),
        variants=tuple(ordered),
        num_parameters=sum(prod(shape) for shape in shapes),
        num_bytes=sum(p.stat().st_size for p in reader.paths),
        dtypes=tuple(sorted({str(d).removeprefix("torch.") for d in dtypes})),
    )


def _prompts(folder: Path, present: Mapping[str, Component]) -> tuple[str, ...] | None:
    if "text_encoder" in present:
        return None
    return tuple(_config(folder, present["prompt_embeddings"]).get("prompts", ()))


def _licence(folder: Path, fmt: Format) -> str:
    """Return the stated licence: README's front matter, model_index.json, LICENSE's first line."""
    readme = folder / "README.md"
    if holds_something(readme):
        text = read_small(readme).decode(errors="replace")
        front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
        stated = re.search(r"^license:\s*[\"']?([^\"'\n]+)", front[1], re.M) if front else None
        if stated:
            return stated[1].strip()
    stated = fmt is NATIVE and read_metadata(folder, fmt).get("license")
    if stated:
        return str(stated)
    licence = folder / "LICENSE"
    if holds_something(licence):
        lines = read_small(licence).decode(errors="replace").strip().splitlines()
        if lines:
            return lines[0].strip()
    return "not stated" if fmt is NATIVE else PUBLISHED_LICENCE
