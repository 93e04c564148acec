"""The types of the pipeline's call, and arguments that users of diffusers type by habit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypedDict, TypeVar, overload

import numpy as np
from PIL import Image
from torch import Generator, Tensor

from tadsr.conditioning import TimestepLike
from tadsr.config import ColorFix, Seamless, UpscaleSettings
from tadsr.images import ArrayImage
from tadsr.onestep import TileSpec
from tadsr.progress import Progress

if TYPE_CHECKING:
    from typing_extensions import Unpack as Unpack


Picture = TypeVar("Picture", Image.Image, np.ndarray, Tensor, ArrayImage)
"""One image, or a batch of tensors, in the kind that the result has as well."""
Pixels: TypeAlias = Image.Image | np.ndarray | ArrayImage
"""One image."""


At: TypeAlias = "TimestepLike | Sequence[TimestepLike] | None"


class CallOptions(TypedDict, total=False):
    """What a call takes beside image and timestep."""

    scale: float
    prompt: str | Sequence[str] | None
    color_fix: ColorFix | None
    process_size: int | None
    seamless: Seamless | None
    tiling: TileSpec | Literal["auto"] | None
    settings: UpscaleSettings | None
    generator: Generator | Sequence[Generator] | None
    progress: Progress | None


class AsItCame(CallOptions, total=False):
    """For a result of the kind that came in."""

    output_type: None


class AsPil(CallOptions):
    """For a PIL image."""

    output_type: Literal["pil"]


class AsArray(CallOptions):
    """For an array."""

    output_type: Literal["np"]


class AsTensor(CallOptions):
    """For a tensor."""

    output_type: Literal["pt"]


class AsAny(CallOptions, total=False):
    """For whatever is asked for."""

    output_type: str | None
    return_dict: bool | None


class Restore(Protocol):
    """A pipeline's call: what comes back is of the kind that came in, or of `output_type`."""

    @overload
    def __call__(
        self, image: Picture, timestep: At = ..., **options: Unpack[AsItCame]
    ) -> Picture: ...
    @overload
    def __call__(
        self, image: Sequence[Picture], timestep: At = ..., **options: Unpack[AsItCame]
    ) -> list[Picture]: ...
    @overload
    def __call__(
        self, image: Pixels, timestep: At = ..., **options: Unpack[AsPil]
    ) -> Image.Image: ...
    @overload
    def __call__(
        self, image: Sequence[Pixels | Tensor], timestep: At = ..., **options: Unpack[AsPil]
    ) -> list[Image.Image]: ...
    @overload
    def __call__(
        self, image: Pixels, timestep: At = ..., **options: Unpack[AsArray]
    ) -> np.ndarray: ...
    @overload
    def __call__(
        self, image: Sequence[Pixels | Tensor], timestep: At = ..., **options: Unpack[AsArray]
    ) -> list[np.ndarray]: ...
    @overload
    def __call__(
        self, image: Pixels | Tensor, timestep: At = ..., **options: Unpack[AsTensor]
    ) -> Tensor: ...
    @overload
    def __call__(
        self, image: Sequence[Pixels | Tensor], timestep: At = ..., **options: Unpack[AsTensor]
    ) -> list[Tensor]: ...
    @overload
    def __call__(self, image: Any, timestep: At = ..., **options: Unpack[AsAny]) -> Any: ...


_KNOB = "there is one step without guidance; timestep=, 0..999, moves from faithful to vivid"
_SIZE = "scale= is the output's size over the input's"
_TILES = "tiling=TileSpec(...) sets how large images are computed in pieces"
_MANY = "give a list of images, or call sweep() for several timesteps"
_WHERE = "timestep= takes a map of how far each part may go"
_NO_GUIDANCE = "there is no guidance that it could steer; leave it out"
_FIRST = "the image, or a list of them, comes first: pipe(image)"
_LEAVE_OUT = "it is so anyway; leave it out"
_PROGRESS = "progress= is told the share of the work that is done, and may raise to cancel"
_ARGUMENTS_INSTEAD = {
    **dict.fromkeys(("num_inference_steps", "sigmas", "guidance_scale", "guidance_rescale"), _KNOB),
    **dict.fromkeys(("denoise_strength", "fidelity_weight"), _KNOB),
    **dict.fromkeys(("strength", "noise_level", "denoising_start", "denoising_end"), _KNOB),
    "timesteps": "timestep= takes one for all images, one per image, or a map",
    "eta": "generator= samples; without it the likeliest result comes",
    **dict.fromkeys(("negative_prompt", "negative_prompt_embeds"), _NO_GUIDANCE),
    **dict.fromkeys(("mask_image", "control_image", "face_enhance"), _WHERE),
    "seed": "generator=torch.Generator().manual_seed(...) samples",
    **dict.fromkeys(("tile", "tile_size", "tile_pad", "tile_overlap"), _TILES),
    **dict.fromkeys(("upscale", "outscale", "scale_factor", "upscale_factor"), _SIZE),
    **dict.fromkeys(("height", "width"), _SIZE),
    **dict.fromkeys(("num_images_per_prompt", "batch_size"), _MANY),
    **dict.fromkeys(("images", "img", "input", "input_image"), _FIRST),
    "verbose": _PROGRESS,
    "ip_adapter_image": "the image to restore is the only one it looks at; leave it out",
    "clip_skip": "the text encoder is used as the student was trained with; leave it out",
    "latents": "restore() takes tensors",
    "prompt_embeds": "restore() takes embeddings",
    **dict.fromkeys(("callback", "callback_steps", "callback_on_step_end"), _PROGRESS),
    "callback_on_step_end_tensor_inputs": _PROGRESS,
    "cross_attention_kwargs": "set_adapters(names, weights) weighs LoRAs",
}
_PART = "assign it after loading, as in pipe.unet = ..."
_DEVICE = 'call to("cuda") after loading, or enable_model_cpu_offload()'
_NONE = "there is none; leave it out"
_NO_CODE = "no code is loaded from a checkpoint; leave it out"
_LOADING_INSTEAD = {
    "dtype": "torch_dtype= is the type of the weights",
    "use_safetensors": "safetensors come first, and a pickle never executes; leave it out",
    **dict.fromkeys(("safe_serialization", "low_cpu_mem_usage", "resume_download"), _LEAVE_OUT),
    **dict.fromkeys(("safety_checker", "requires_safety_checker", "feature_extractor"), _NONE),
    **dict.fromkeys(("device", "device_map"), _DEVICE),
    "subfolder": "give the path of the folder itself",
    **dict.fromkeys(("custom_pipeline", "trust_remote_code"), _NO_CODE),
    "force_download": "delete the model from the hub's cache first",
    "proxies": "the environment variable HTTPS_PROXY says it",
    "max_shard_size": "each network is one file; leave it out",
    "push_to_hub": "call push_to_hub(repo_id)",
    **dict.fromkeys(("unet", "vae", "scheduler", "text_encoder", "tokenizer"), _PART),
}

Call = TypeVar("Call", bound=Callable[..., Any])


def takes_habits(call: Callable[..., Any]) -> Restore:
    """Let a call answer diffusers' arguments, `return_dict` too, and show its progress bar."""

    @wraps(call)
    def answered(
        self: Any, *arguments: Any, return_dict: bool | None = None, **options: Any
    ) -> Any:
        _answer(options, _ARGUMENTS_INSTEAD)
        is_swapped = len(arguments) > 1 and isinstance(arguments[0], str)
        if is_swapped or (arguments and "image" in options):
            raise TypeError("the image comes first and the prompt by name: pipe(image, prompt=...)")
        settings = getattr(self, "_progress_bar_config", None)
        if options.get("progress") is None and settings and not settings.get("disable"):
            with self.progress_bar(total=1.0) as bar:
                options["progress"] = lambda share: bar.update(share - bar.n)
                result = call(self, *arguments, **options)
        else:
            result = call(self, *arguments, **options)
        if return_dict is None:
            return _with_images(result)
        is_many = isinstance(result, list) or (isinstance(result, Tensor) and result.ndim == 4)
        images = result if is_many else [result]
        if not return_dict:
            return (images,)
        from diffusers.pipelines.pipeline_utils import ImagePipelineOutput  # heavy

        return ImagePipelineOutput(images=images)

    return answered


def answers_loading(method: Call) -> Call:
    """Let a pipeline's loading or saving answer diffusers' arguments."""

    @wraps(method)
    def answered(self: Any, *arguments: Any, **options: Any) -> Any:
        _answer(options, _LOADING_INSTEAD)
        return method(self, *arguments, **options)

    return answered  # type: ignore[return-value]


def _answer(options: Mapping[str, Any], instead: Mapping[str, str]) -> None:
    for name in options:
        if name in instead:
            raise TypeError(f"{name} has no meaning here: {instead[name]}")


class _Picture(Image.Image):
    """A result with diffusers' `.images`."""

    images = property(lambda self: [self])

    def __getitem__(self, key: object) -> None:
        raise TypeError("one image in is one image out, no list; give a list to get one")

    def __eq__(self, other: object) -> bool:
        return self.copy() == (other.copy() if isinstance(other, Image.Image) else other)

    __hash__ = None  # type: ignore[assignment]  # as of other images

    def __reduce__(self) -> Any:
        return Image.Image, (), self.__getstate__()


class _Pictures(list[Any]):
    """Results with diffusers' `.images`."""

    images = property(list)


def _with_images(result: Any) -> Any:
    """Let `pipe(image).images` be what `pipe(image)` gives, in a list."""
    if type(result) is list:
        return _Pictures(result)
    if type(result) is Image.Image:
        result.__class__ = _Picture
    return result
