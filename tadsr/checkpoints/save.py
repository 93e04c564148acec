"""Write checkpoints in either format, all or nothing, and convert between them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import CLIPTextModel, PreTrainedTokenizerBase

from tadsr.checkpoints.adapter_files import save_adapters
from tadsr.checkpoints.checkpoint import Checkpoint
from tadsr.checkpoints.components import clip_common_name
from tadsr.checkpoints.detect import PIPELINE_CLASS
from tadsr.checkpoints.layout import NATIVE, OFFICIAL, Component, Format
from tadsr.checkpoints.load import load_checkpoint
from tadsr.errors import CheckpointError, reason_of
from tadsr.networks.adapter_targets import AdapterSet
from tadsr.networks.adapters import extract_adapters, has_adapters, plain_state_dict
from tadsr.networks.prompt_embeddings import PromptEmbeddings
from tadsr.networks.time_aware_vae import TimeAwareAutoencoderKL
from tadsr.whole_file import why_unwritable

_PIPELINE_FILE = """# Lets diffusers open this folder, with tadsr installed:
# DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)
from tadsr import TADSRPipeline

__all__ = ["TADSRPipeline"]
"""
"""tadsr itself never reads it."""


def save_native(
    folder: str | Path,
    *,
    vae: TimeAwareAutoencoderKL,
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    text_encoder: CLIPTextModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    prompt_embeddings: PromptEmbeddings | None = None,
    adapters: AdapterSet | None = None,
    metadata: Mapping[str, Any] | None = None,
    variant: str | None = None,
    dtype: torch.dtype | None = None,
    card: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint in the native format; the folder appears whole or not at all.

    Adapters that are attached to the models are kept apart, in adapters.safetensors.

    Args:
        folder: Where to; it must not exist, be empty, or be replaced by `overwrite`.
        vae: The VAE, plain or with adapters attached.
        unet: The UNet, likewise.
        scheduler: The noise schedule.
        text_encoder: CLIP's text encoder, or None.
        tokenizer: Its tokenizer, or None.
        prompt_embeddings: What stands in for a text encoder, or None.
        adapters: Information only: what is attached to the models now is written.
        metadata: Facts that travel with the weights, such as "license".
        variant: Put into the weight files' names, such as "fp16".
        dtype: Floating dtype of the written weights, adapters excepted; None keeps the models'.
        card: The model card, Markdown for README.md; None for none.
        overwrite: Replace a folder that exists.

    Returns:
        The folder.

    Raises:
        CheckpointError: The folder is not empty or cannot be written, or `adapters` are given
            that are not attached.
        ValueError: `variant` is not made of letters, digits and underscores.
    """
    if variant is not None and (not variant or not variant.replace("_", "a").isalnum()):
        raise ValueError(
            f"variant must be letters, digits and underscores such as 'fp16', got {variant!r}"
        )
    checkpoint = Checkpoint(
        vae, unet, scheduler, text_encoder, tokenizer, prompt_embeddings, adapters,
        metadata=metadata or {},
    )  # fmt: skip
    texts = ("text_encoder", "tokenizer") if prompt_embeddings is None else ()
    _check_parts(checkpoint, *texts)
    attached = _attached_adapters(checkpoint)
    with write_atomically(Path(folder), overwrite) as temporary:
        _write_components(checkpoint, NATIVE, temporary, variant, dtype)
        if attached is not None:
            save_adapters(attached, temporary / NATIVE.adapter_file)
        _write_json(temporary / "model_index.json", _model_index(checkpoint))
        (temporary / "pipeline.py").write_text(_PIPELINE_FILE, encoding="utf-8")
        if card is not None:
            (temporary / "README.md").write_text(card, encoding="utf-8")
    return Path(folder)


def save_official(
    folder: str | Path,
    *,
    vae: TimeAwareAutoencoderKL,
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    text_encoder: CLIPTextModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    prompt_embeddings: PromptEmbeddings | None = None,
    adapters: AdapterSet | None = None,
    metadata: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint in the published layout: the base model's folder with tadsr.pkl inside.

    What is not listed here is as for `save_native`.

    Args:
        vae: The VAE with adapters attached.
        unet: The UNet with adapters attached.
        text_encoder: CLIP's text encoder; needed.
        tokenizer: Its tokenizer; needed.
        prompt_embeddings: Not part of this format, so not written.
        metadata: Not part of this format, so not written.

    Returns:
        The folder.

    Raises:
        CheckpointError: The adapters are merged, the text encoder is missing, the folder is not
            empty, or cannot be written.
    """
    checkpoint = Checkpoint(
        vae, unet, scheduler, text_encoder, tokenizer, adapters=adapters, metadata=metadata or {}
    )
    _check_parts(checkpoint)
    attached = _attached_adapters(checkpoint)
    if attached is None:
        raise CheckpointError(
            "the published format stores adapters apart from the base model, but this checkpoint "
            "has them merged, and a merged model cannot be split; load it with "
            "merge_adapters=False, or save the native format (--to native)"
        )
    if text_encoder is None or tokenizer is None:
        raise CheckpointError(
            "the published format needs a text encoder and a tokenizer, but this checkpoint has "
            "prompt embeddings instead; save the native format"
        )
    with write_atomically(Path(folder), overwrite) as temporary:
        _write_components(checkpoint, OFFICIAL, temporary, None, dtype)
        save_adapters(attached, temporary / OFFICIAL.adapter_file)
    return Path(folder)


def convert_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    adapter: str | Path | None = None,
    to: Literal["native", "official"] = "native",
    dtype: torch.dtype | None = None,
    keep_adapters: bool = False,
    overwrite: bool = False,
) -> Path:
    """Convert a checkpoint to another format or dtype.

    What is not listed here is as for `load_checkpoint`.

    Args:
        out: The folder to write.
        to: "native" or "official".
        dtype: Floating dtype of the written weights; None keeps the stored one.
        keep_adapters: Keep adapters apart in the native format; the published one always does.
        overwrite: Replace a folder that exists.

    Returns:
        The written folder.

    Raises:
        CheckpointError: The source cannot be loaded, the target cannot be written, or
            merged adapters should be split.
        ValueError: `to` is no format.
    """
    if to not in ("native", "official"):
        raise ValueError(f"to must be 'native' or 'official', got {to!r}")
    check_target(Path(out), overwrite)  # before minutes of loading
    apart = keep_adapters or to == "official"
    checkpoint = load_checkpoint(
        source, adapter=adapter, torch_dtype=dtype or "auto", merge_adapters=not apart
    )
    save = save_native if to == "native" else save_official
    return save(out, **checkpoint.components(), dtype=dtype, overwrite=overwrite)


def _check_parts(checkpoint: Checkpoint, *further: str) -> None:
    """Raise CheckpointError if a part that must be saved is missing, or is something else."""
    for name in ("vae", "unet", "scheduler", *further):
        part = getattr(checkpoint, name)
        if part is None or not (hasattr(part, "config") or name == "tokenizer"):
            raise CheckpointError(
                f"{name} must be a {NATIVE.component(name).class_name} to be saved, got "
                f"{type(part).__name__}; assign one, as in pipe.{name} = ..."
            )


def _attached_adapters(checkpoint: Checkpoint) -> AdapterSet | None:
    """Return attached adapters as they are now: training may have moved on since loading."""
    attached = [has_adapters(model) for model in (checkpoint.unet, checkpoint.vae)]
    if any(attached) and not all(attached):
        raise CheckpointError(
            "UNet and VAE must both have adapters attached or both be merged, but only one has"
        )
    if checkpoint.adapters is not None and not any(attached):
        raise CheckpointError(
            "adapters were given, but the models have none attached: if they were merged since "
            "loading, leave adapters out; if not, attach them with attach_adapters"
        )
    return extract_adapters(checkpoint.unet, checkpoint.vae) if all(attached) else None


def _write_components(
    checkpoint: Checkpoint,
    fmt: Format,
    folder: Path,
    variant: str | None,
    dtype: torch.dtype | None,
) -> None:
    for component in fmt.components:
        part = getattr(checkpoint, component.name)
        if part is None:
            continue
        place = folder / component.folder
        place.mkdir()
        if component.name == "scheduler":
            part.save_config(place)
        elif component.name == "tokenizer":
            _write_tokenizer(part, place, component)
        else:
            infix = f".{variant}" if variant else ""
            weights = place / f"{component.stems[0]}{infix}.safetensors"
            _write_network(part, weights, component, dtype)


def _write_network(
    model: Any, weights: Path, component: Component, dtype: torch.dtype | None
) -> None:
    is_text_encoder = component.name == "text_encoder"
    tensors = {}
    for name, tensor in plain_state_dict(model).items():
        # Every library version reads the prefixed names, only the newest the bare ones.
        common = clip_common_name(name)
        if is_text_encoder and common is None:
            continue
        is_cast = dtype is not None and tensor.is_floating_point()
        tensors[f"text_model.{common}" if is_text_encoder else name] = tensor.to(
            "cpu", dtype if is_cast else tensor.dtype
        ).contiguous()
    save_file(tensors, weights, metadata={"format": "pt"})
    if not is_text_encoder:
        model.save_config(weights.parent)
        return
    config = json.loads(model.config.to_json_string())
    config.pop("dtype", None)
    # transformers loads in the dtype that the config states.
    config["torch_dtype"] = str(dtype or model.dtype).removeprefix("torch.")
    config["architectures"] = [component.class_name]
    _write_json(weights.with_name(component.config), config)


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, place: Path, component: Component) -> None:
    """Copy the tokenizer's own files if possible: library versions write them differently."""
    origin = Path(str(tokenizer.name_or_path or ""))
    if tokenizer.name_or_path and (origin / component.config).is_file():
        for name in (component.config, *component.other_files):
            if (origin / name).is_file():
                shutil.copyfile(origin / name, place / name)
    else:
        tokenizer.save_pretrained(place)


def _model_index(checkpoint: Checkpoint) -> dict[str, Any]:
    index: dict[str, Any] = {
        "_class_name": PIPELINE_CLASS,
        "_diffusers_version": diffusers.__version__,
    }
    for component in NATIVE.components:
        exists = getattr(checkpoint, component.name) is not None
        index[component.name] = [component.module, component.class_name] if exists else [None, None]
    if checkpoint.metadata:
        index["tadsr_metadata"] = dict(checkpoint.metadata)
    return index


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_target(folder: Path, overwrite: bool) -> None:
    """Raise CheckpointError unless a folder may be written: new, empty, or to be replaced."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"the target must be a folder, but {folder} is a file")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise CheckpointError(
            f"the target {folder} must be new or empty, but it has files; choose another or "
            "allow overwriting (overwrite=True, --overwrite)"
        )
    if reason := why_unwritable(folder.absolute().parent):
        raise CheckpointError(f"{folder} cannot be written, for {reason}; choose another folder")


@contextmanager
def write_atomically(folder: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a sibling folder to fill, which takes the target's place only if all went well."""
    check_target(folder, overwrite)
    folder = folder.absolute()
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        filling = temporary / "new"  # mkdtemp's own mode is private, a sub-folder's is the usual
        filling.mkdir()
        yield filling
        _open_to_readers(filling)
        if folder.exists():
            # Renamed away first: a model mapped from these files keeps them while it lives.
            folder.rename(temporary / "old")
        os.replace(filling, folder)
    except (OSError, SafetensorError) as error:
        if temporary is not None and (temporary / "old").exists() and not folder.exists():
            (temporary / "old").rename(folder)
        raise CheckpointError(f"{folder} cannot be written: {reason_of(error)}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _open_to_readers(folder: Path) -> None:
    """Give every file the mode a plain new file gets: safetensors writes private ones."""
    plain = folder / ".mode"
    plain.touch()
    for file in folder.rglob("*"):
        if file.is_file():
            shutil.copymode(plain, file)
    plain.unlink()
