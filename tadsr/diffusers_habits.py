"""Methods that users of diffusers call by habit: they work, or the error says what does."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from diffusers.loaders import StableDiffusionLoraLoaderMixin

from tadsr.errors import TADSRError
from tadsr.networks.adapters import has_adapters
from tadsr.networks.time_aware_vae import TimeAwareAutoencoderKL
from tadsr.prompts import TextEmbeddings
from tadsr.quiet import quiet_libraries

_PIECES = "large images are computed in pieces anyway; tiling=TileSpec(...) sets how"
_METHODS_INSTEAD = {
    "enable_vae_tiling": _PIECES,
    "disable_vae_tiling": "tiling=None never computes in pieces",
    "enable_vae_slicing": "as many images as fit are computed together; give a list",
    "disable_vae_slicing": "as many images as fit are computed together; give a list",
    "enable_freeu": "the student was not trained for it; timestep= moves from faithful to vivid",
    "disable_freeu": "it is never on",
    "load_ip_adapter": "the image to restore is the only one it looks at",
    "load_textual_inversion": "load_lora_weights() is what changes a style",
    "from_single_file": "from_pretrained() takes a folder or a hub id, and adapter= one file",
    "fuse_qkv_projections": 'set_engine("fused") folds what can be folded',
    "unfuse_qkv_projections": 'set_engine("eager") runs the modules as they are',
}


class DiffusersHabits(StableDiffusionLoraLoaderMixin):
    """The methods of diffusers' pipelines that need a word of their own here."""

    _text_embeddings: TextEmbeddings


def _refused(name: str, instead: str) -> Callable[..., None]:
    def refuse(self: Any, *_: Any, **__: Any) -> None:
        raise TADSRError(f"{name} has no meaning here: {instead}")

    refuse.__name__ = name
    refuse.__doc__ = f"Raise TADSRError: {instead}."
    return refuse


def _guarded(name: str) -> Callable[..., Any]:
    """Return one of the mixin's methods, with what is kept of prompts forgotten."""
    method = getattr(StableDiffusionLoraLoaderMixin, name)

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


for _name, _instead in _METHODS_INSTEAD.items():
    setattr(DiffusersHabits, _name, _refused(_name, _instead))
for _name in ("tiling", "slicing"):  # what newer versions of diffusers call them
    _instead = _METHODS_INSTEAD[f"enable_vae_{_name}"]
    setattr(TimeAwareAutoencoderKL, f"enable_{_name}", _refused(f"enable_{_name}", _instead))
for _name in (
    *("load_lora_weights", "unload_lora_weights", "fuse_lora", "unfuse_lora"),
    *("set_adapters", "enable_lora", "disable_lora", "delete_adapters"),
):
    setattr(DiffusersHabits, _name, _guarded(_name))
