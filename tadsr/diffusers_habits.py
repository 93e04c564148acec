"""What users of diffusers type by habit: it works, or the error names what to type instead."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from tadsr.errors import TADSRError
from tadsr.networks.adapters import has_adapters
from tadsr.prompts import TextEmbeddings
from tadsr.quiet import quiet_libraries

_KNOB = "there is one step without guidance; timestep=, 0..999, moves from faithful to vivid"
_SIZE = "scale= is the output's size over the input's"
_PROGRESS = "progress= is told the share of the work that is done, and may raise to cancel"
_ARGUMENTS_INSTEAD = {
    "num_inference_steps": _KNOB,
    "timesteps": "timestep= takes one for all images, one per image, or a map",
    "sigmas": _KNOB,
    "guidance_scale": _KNOB,
    "guidance_rescale": _KNOB,
    "strength": _KNOB,
    "denoising_end": _KNOB,
    "eta": "generator= samples; without it the likeliest result comes",
    "noise_level": _KNOB,
    "negative_prompt": "there is no guidance that it could steer; leave it out",
    "height": _SIZE,
    "width": _SIZE,
    "num_images_per_prompt": "give a list of images, or call sweep() for several timesteps",
    "latents": "restore() takes tensors",
    "prompt_embeds": "restore() takes embeddings",
    "callback": _PROGRESS,
    "callback_on_step_end": _PROGRESS,
    "cross_attention_kwargs": "set_adapters(names, weights) weighs LoRAs",
}
_PIECES = "large images are computed in pieces anyway; tiling=TileSpec(...) sets how"
_METHODS_INSTEAD = {
    "enable_vae_tiling": _PIECES,
    "disable_vae_tiling": "tiling=None never computes in pieces",
    "enable_vae_slicing": "as many images as fit are computed together; give a list",
    "disable_vae_slicing": "as many images as fit are computed together; give a list",
    "enable_freeu": "the student was not trained for it; timestep= moves from faithful to vivid",
    "disable_freeu": "it is never on",
    "fuse_qkv_projections": 'set_engine("fused") folds what can be folded',
    "unfuse_qkv_projections": 'set_engine("eager") runs the modules as they are',
}

Call = TypeVar("Call", bound=Callable[..., Any])


def takes_habits(call: Call) -> Call:
    """Let a call answer diffusers' arguments, `return_dict` too, and show its progress bar."""

    @wraps(call)
    def answered(self: Any, *arguments: Any, return_dict: bool = False, **options: Any) -> Any:
        for name in options.keys() & _ARGUMENTS_INSTEAD.keys():
            raise TypeError(f"{name} has no meaning here: {_ARGUMENTS_INSTEAD[name]}")
        settings = getattr(self, "_progress_bar_config", None)
        if options.get("progress") is None and settings and not settings.get("disable"):
            with self.progress_bar(total=1.0) as bar:
                options["progress"] = lambda share: bar.update(share - bar.n)
                result = call(self, *arguments, **options)
        else:
            result = call(self, *arguments, **options)
        if not return_dict:
            return result
        is_many = isinstance(result, list) or (isinstance(result, Tensor) and result.ndim == 4)
        return ImagePipelineOutput(images=result if is_many else [result])

    return answered  # type: ignore[return-value]


class DiffusersHabits(StableDiffusionLoraLoaderMixin):
    """The methods of diffusers' pipelines that need a word of their own here."""

    _text_embeddings: TextEmbeddings


def _refused(name: str, instead: str) -> Callable[..., None]:
    def refuse(self: DiffusersHabits, *_: Any, **__: Any) -> None:
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
for _name in (
    "load_lora_weights",
    "unload_lora_weights",
    "fuse_lora",
    "unfuse_lora",
    "set_adapters",
    "enable_lora",
    "disable_lora",
    "delete_adapters",
):
    setattr(DiffusersHabits, _name, _guarded(_name))
