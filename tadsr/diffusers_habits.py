"""Methods that users of diffusers call by habit: they work, or the error says what does."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import StableDiffusionLoraLoaderMixin

from tadsr.checkpoints.detect import HUB_ID
from tadsr.checkpoints.json_files import user_path
from tadsr.errors import CheckpointError, TADSRError, reason_of
from tadsr.machine import check_device
from tadsr.networks.adapters import has_adapters
from tadsr.networks.time_aware_vae import TimeAwareAutoencoderKL
from tadsr.prompts import TextEmbeddings
from tadsr.quiet import quiet_libraries

_PIECES = "large images are computed in pieces anyway; tiling=TileSpec(...) sets how"
_CALL = "call the pipeline itself: pipe(image, scale=4)"
_METHODS_INSTEAD = {
    "enable_vae_tiling": _PIECES,
    "disable_vae_tiling": "tiling=None never computes in pieces",
    "enable_vae_slicing": "as many images as fit are computed together; give a list",
    "disable_vae_slicing": "as many images as fit are computed together; give a list",
    "enable_freeu": "the student was not trained for it; timestep= moves from faithful to vivid",
    "disable_freeu": "it is never on",
    "enable_xformers_memory_efficient_attention": "PyTorch's own attention needs as little memory",
    **dict.fromkeys(("enhance", "upscale", "process", "predict", "run"), _CALL),
    "compile": 'set_engine("compile") compiles the networks',
    "load_ip_adapter": "the image to restore is the only one it looks at",
    "load_textual_inversion": "load_lora_weights() is what changes a style",
    "from_single_file": "from_pretrained() takes a folder or a hub id, and adapter= one file",
    "fuse_qkv_projections": 'set_engine("fused") folds what can be folded',
    "unfuse_qkv_projections": 'set_engine("eager") runs the modules as they are',
    "cuda": 'to("cuda") moves the networks',
    "cpu": 'to("cpu") moves the networks',
    "half": "to(torch.float16) casts the networks",
    "float": "to(torch.float32) casts the networks",
    "eval": "the networks are in evaluation mode anyway",
}
_LORA_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


class DiffusersHabits(StableDiffusionLoraLoaderMixin):
    """The methods of diffusers' pipelines that need a word of their own here."""

    _text_embeddings: TextEmbeddings


def _refused(name: str, instead: str) -> Callable[..., None]:
    def refuse(self: Any, *_: Any, **__: Any) -> None:
        raise TADSRError(f"{name} has no meaning here: {instead}")

    refuse.__name__ = name
    refuse.__doc__ = f"Raise TADSRError: {instead}."
    return refuse


def _offloading(name: str) -> Callable[..., None]:
    """Return one of diffusers' methods, for a device that is there."""
    method = getattr(DiffusionPipeline, name)

    @wraps(method)
    def offload(
        self: Any, gpu_id: int | None = None, device: str | torch.device | None = None
    ) -> None:
        place = device or torch.accelerator.current_accelerator() or "cuda"
        check_device(place if gpu_id is None else f"{place}:{gpu_id}")
        method(self, gpu_id, device)

    return offload


def _guarded(name: str) -> Callable[..., Any]:
    """Return one of the mixin's methods, with what is kept of prompts forgotten."""
    method = getattr(StableDiffusionLoraLoaderMixin, name)
    method = _reading_lora(method) if name == "load_lora_weights" else method

    @wraps(method)
    def change(self: Any, *arguments: Any, **options: Any) -> Any:
        if has_adapters(self.vae):
            raise TADSRError(
                f"{name} would mix a LoRA with the student's own adapters, which are kept apart; "
                "call merge_adapters() first"
            )
        with self._lock, quiet_libraries():
            result = method(self, *arguments, **options)
            # The text encoder may have changed.
            self._text_embeddings.clear()
        return result

    return change


def _reading_lora(method: Callable[..., None]) -> Callable[..., None]:
    """Ask the network for nothing but a hub's repository, and say what cannot be loaded."""

    @wraps(method)
    def load(
        self: Any, pretrained_model_name_or_path_or_dict: Any, *arguments: Any, **options: Any
    ) -> None:
        source = pretrained_model_name_or_path_or_dict
        if not isinstance(source, Mapping):
            path = user_path(source)
            is_hub_id = HUB_ID.fullmatch(str(source)) and path.suffix not in _LORA_SUFFIXES
            if os.path.exists(path):
                source = str(path)
            elif not is_hub_id:
                raise CheckpointError(
                    f"a LoRA must be a file, a folder or a hub id 'owner/name', but {source} does "
                    "not exist; check the path"
                )
        before = self.get_list_adapters()
        name = "these tensors" if isinstance(source, Mapping) else source
        try:
            method(self, source, *arguments, **options)
            if self.get_list_adapters() == before:
                raise ValueError("it holds nothing for these networks")
        except (TADSRError, TypeError):
            raise
        except Exception as error:  # each library raises its own types
            raise CheckpointError(
                f"{name} cannot be loaded as a LoRA ({reason_of(error)}); it must be "
                "one for Stable Diffusion 2.1, in diffusers' or PEFT's format"
            ) from error

    return load


for _name, _instead in _METHODS_INSTEAD.items():
    setattr(DiffusersHabits, _name, _refused(_name, _instead))
for _name in ("tiling", "slicing"):  # what newer versions of diffusers call them
    _instead = _METHODS_INSTEAD[f"enable_vae_{_name}"]
    setattr(TimeAwareAutoencoderKL, f"enable_{_name}", _refused(f"enable_{_name}", _instead))
for _name in ("enable_model_cpu_offload", "enable_sequential_cpu_offload"):
    setattr(DiffusersHabits, _name, _offloading(_name))
for _name in (
    *("load_lora_weights", "unload_lora_weights", "fuse_lora", "unfuse_lora"),
    *("set_adapters", "enable_lora", "disable_lora", "delete_adapters"),
):
    setattr(DiffusersHabits, _name, _guarded(_name))
