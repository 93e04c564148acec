"""The one-step super-resolution pipeline: images in, images four times larger out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from tadsr.checkpoints import load_checkpoint
from tadsr.conditioning import (
    TimestepField,
    TimestepLike,
    TimestepMap,
    read_timestep_maps,
    read_timesteps,
)
from tadsr.config import ColorFix, UpscaleSettings
from tadsr.diffusers_habits import DiffusersHabits, takes_habits
from tadsr.images import (
    DecodedImage,
    alpha_rows,
    assemble_images,
    check_streamable,
    check_writable,
    decode_image,
    stack_images,
    takes_bytes,
    write_strips,
)
from tadsr.networks.prompt_embeddings import PromptEmbeddings
from tadsr.networks.time_aware_vae import TimeAwareAutoencoderKL
from tadsr.onestep import (
    EngineName,
    EnginePlan,
    NetworkLock,
    OneStepEngine,
    TileSpec,
    batch_pixels,
    group_timesteps,
    read_generators,
    same_size_ranges,
)
from tadsr.onestep.banded import Strip
from tadsr.onestep.conditions import Conditions
from tadsr.onestep.whole import upscale
from tadsr.pipeline_tensors import PipelineTensors
from tadsr.pipeline_weights import PipelineWeights
from tadsr.progress import Progress, paced, share_of
from tadsr.prompts import (
    Prompts,
    PromptStyle,
    TextEmbeddings,
    check_taggable,
    choose_prompts,
    embed_texts,
)
from tadsr.schedule import make_alphas_cumprod

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from tadsr.images import ArrayImage
    from tadsr.pipeline_types import CallOptions, Picture, Unpack


class TADSRPipeline(DiffusersHabits, PipelineTensors, PipelineWeights, DiffusionPipeline):
    """Restore and enlarge photographs in one diffusion step, with a timestep as the knob.

    Threads may share a pipeline: one at a time uses the networks, while the others decode and
    encode images.

    Args:
        vae: Time-aware autoencoder.
        unet: One-step student.
        scheduler: Any diffusers scheduler; only its betas are read.
        text_encoder: CLIP text model, or None where `prompt_embeddings` is given.
        tokenizer: Tokenizer of `text_encoder`.
        prompt_embeddings: Embeddings carried as tensors, used when there is no text encoder.

    Raises:
        ValueError: Neither a text encoder with tokenizer nor prompt embeddings are given, or the
            scheduler does not predict noise.

    Source: TADSR (arXiv 2508.16557).
    """

    model_cpu_offload_seq = "text_encoder->prompt_embeddings->vae->unet"
    _optional_components = ("text_encoder", "tokenizer", "prompt_embeddings")

    def __init__(
        self,
        vae: TimeAwareAutoencoderKL,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        text_encoder: Any = None,
        tokenizer: Any = None,
        prompt_embeddings: PromptEmbeddings | None = None,
    ) -> None:
        super().__init__()
        if prompt_embeddings is None and (text_encoder is None or tokenizer is None):
            raise ValueError(
                "a pipeline must have a text_encoder with its tokenizer, or prompt_embeddings; "
                "got neither"
            )
        prediction_type = scheduler.config.get("prediction_type", "epsilon")
        if prediction_type != "epsilon":
            raise ValueError(
                f"the scheduler's prediction_type must be 'epsilon', got {prediction_type!r}; "
                "use weights based on stable-diffusion-2-1-base, not on the 768 px model"
            )
        self.register_modules(
            vae=vae,
            unet=unet,
            scheduler=scheduler,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            prompt_embeddings=prompt_embeddings,
        )
        config = scheduler.config
        self.alphas_cumprod = make_alphas_cumprod(
            config.beta_start, config.beta_end, config.beta_schedule, config.num_train_timesteps
        )
        self._lock = NetworkLock()
        self._text_embeddings = TextEmbeddings()
        self._engine = OneStepEngine(vae, unet, self.alphas_cumprod)
        self.tagger: Callable[[Any], str] | None = None
        self.prompt_style: PromptStyle = "published"
        self.metadata: Mapping[str, Any] = {}

    @classmethod
    @torch.inference_mode(False)  # weights made in a caller's mode could not be trained
    def from_pretrained(
        cls,
        source: str | Path = "tadsr-tiny",
        *,
        adapter: str | Path | None = None,
        variant: str | None = None,
        torch_dtype: torch.dtype | None = None,
        merge_adapters: bool = True,
        tagger: str | Path | Callable[[Any], str] | None = None,
        engine: EngineName = "auto",
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> TADSRPipeline:
        """Load a pipeline from the package, a folder or a hub repository.

        Args:
            source: "tadsr-tiny" (inside the package), a folder in the native or the published
                format, or a hub id such as "owner/name".
            adapter: Published `tadsr.pkl`, when it does not lie in the base folder.
            variant: Variant of the weight files, such as "fp16".
            torch_dtype: Type of the weights in memory; None for float32.
            merge_adapters: Whether LoRA matrices are added into the weights; False keeps them
                apart as PEFT layers (slower, for training and conversion).
            tagger: What describes each image, before the user's prompt: a callable from a PIL
                image to a text, "module:name" for one, "dape" for the published tagger beside the
                checkpoint, "ram" for the same without its adapter, or a folder or hub id that
                holds it. None leaves the user's prompt alone. `prompt_style` of the pipeline says
                how the two are joined.
            engine: How the networks are run; see `set_engine`.
            revision: Branch, tag or commit on the hub.
            cache_dir: Folder for downloads instead of huggingface-hub's own.
            local_files_only: Use only what is already downloaded.
            token: Hub token for private repositories.

        Returns:
            The pipeline on the CPU, in evaluation mode.

        Raises:
            CheckpointError: The checkpoint is missing, damaged, unsafe or does not fit.
            ValueError: A tagger is given, but the model has no text encoder to read its prompts.
        """
        hub = {
            "revision": revision,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "token": token,
        }
        checkpoint = load_checkpoint(
            source,
            adapter=adapter,
            variant=variant,
            torch_dtype=torch_dtype or torch.float32,
            merge_adapters=merge_adapters,
            **hub,
        )
        pipe = cls(
            vae=checkpoint.vae,
            unet=checkpoint.unet,
            scheduler=checkpoint.scheduler,
            text_encoder=checkpoint.text_encoder,
            tokenizer=checkpoint.tokenizer,
            prompt_embeddings=checkpoint.prompt_embeddings,
        )
        pipe.metadata = checkpoint.metadata
        pipe.set_engine(engine)
        if tagger is not None:
            # Only here: it brings further networks with it.
            from tadsr.checkpoints.tagger import open_tagger

            check_taggable(pipe.text_encoder)
            pipe.tagger = open_tagger(tagger, source, **hub)
        return pipe

    @property
    def engine(self) -> OneStepEngine:
        """What runs the networks that the pipeline holds now."""
        engine = self._engine
        if engine.vae is not self.vae or engine.unet is not self.unet:
            self._engine = OneStepEngine(self.vae, self.unet, self.alphas_cumprod, engine.choice)
        return self._engine

    def set_engine(self, engine: EngineName | EnginePlan) -> None:
        """Choose how the networks are run; the result is the same.

        Args:
            engine: "fused" (tadsr's own forward with fused kernels, folded weights and, on CUDA,
                recorded graphs), "eager" (diffusers' modules as they are), "compile"
                (torch.compile on them, slow at every new size), or "auto", the fastest that runs
                the model without compiling. An `EnginePlan` is "fused" with these switches.

        Raises:
            ValueError: `engine` is none of these.
        """
        chosen = OneStepEngine(self.vae, self.unet, self.alphas_cumprod, engine)
        with self._lock:
            self._engine.release()
            self._engine = chosen

    @overload
    def __call__(
        self,
        image: Picture,
        timestep: TimestepLike | Sequence[TimestepLike] = ...,
        *,
        output_type: None = None,
        **options: Unpack[CallOptions],
    ) -> Picture: ...
    @overload
    def __call__(
        self,
        image: Sequence[Picture],
        timestep: TimestepLike | Sequence[TimestepLike] = ...,
        *,
        output_type: None = None,
        **options: Unpack[CallOptions],
    ) -> list[Picture]: ...
    @overload
    def __call__(
        self,
        image: Image.Image | np.ndarray | ArrayImage,
        timestep: TimestepLike = ...,
        *,
        output_type: Literal["pil"],
        **options: Unpack[CallOptions],
    ) -> Image.Image: ...
    @overload
    def __call__(
        self,
        image: Image.Image | np.ndarray | ArrayImage,
        timestep: TimestepLike = ...,
        *,
        output_type: Literal["np"],
        **options: Unpack[CallOptions],
    ) -> np.ndarray: ...
    @overload
    def __call__(
        self,
        image: Image.Image | np.ndarray | ArrayImage | Tensor,
        timestep: TimestepLike | Sequence[TimestepLike] = ...,
        *,
        output_type: Literal["pt"],
        **options: Unpack[CallOptions],
    ) -> Tensor: ...
    @overload
    def __call__(
        self,
        image: Any,
        timestep: TimestepLike | Sequence[TimestepLike] = ...,
        *,
        output_type: str | None = None,
        return_dict: bool = False,
        **options: Unpack[CallOptions],
    ) -> Any: ...
    @takes_habits
    @torch.inference_mode(False)  # what is kept for later calls must outlive a caller's mode
    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        timestep: TimestepLike | Sequence[TimestepLike] = 500,
        *,
        scale: float = 4,
        prompt: str | Sequence[str] | None = None,
        color_fix: ColorFix = "adain",
        process_size: int = 512,
        tiling: TileSpec | Literal["auto"] | None = "auto",
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str | None = None,
        progress: Progress | None = None,
    ) -> Any:
        """Restore images and enlarge them.

        Args:
            image: One image or a list of them: PIL of any mode, what `read_image` gives, uint8 or
                uint16 array (H, W) or (H, W, 1|3|4), float array or tensor (3, H, W) in [0, 1],
                or a tensor batch (B, 3, H, W).
            timestep: 0..999, one for all or one per image; small is faithful, large is vivid.
                Or a map of timesteps over the image: a `TimestepMap`, a grey PIL image or array
                (H, W) of timesteps at any size, or regions as for `TimestepMap.from_regions`.
            scale: Output size over input size, any number ≥ 1; 1 restores at the given size.
            prompt: What the picture shows, one for all or one per image; None is "", which is
                neutral. A tagger's words come before it.
            color_fix: "adain", "wavelet" or "none".
            process_size: Smallest shorter side in px that the network works at; 0 for no limit.
            tiling: "auto" computes large images in pieces, within the memory there is; a
                `TileSpec` sets the pieces; None never does. Up to 2048 × 2048 px of output the
                result is that of the whole.
            generator: Samples the encoder's posterior, one for all images or one per image; None
                takes its mean, so that the same input gives the same output.
            output_type: "pil", "np" (bytes, where diffusers gives floats; 16 bit if the image is)
                or "pt" (floats in [0, 1]); None gives back what came in.
            progress: Called a few times a second with the share of the work that is done, 0..1,
                where an image is computed in pieces; may raise to cancel.

        Returns:
            An image of `round(scale × size)` px of the kind that came in, or a list of them for
            a list; grey stays grey, alpha is carried, the ICC profile is kept.

        Raises:
            TypeError: An argument is of the wrong type.
            ValueError: An argument is out of range, or the numbers of images, timesteps, prompts
                and generators differ.
            TADSRError: The result is not finite at the model's precision.

        Source: TADSR (arXiv 2508.16557), one-step inference.
        """
        settings, progress = UpscaleSettings(scale, color_fix, process_size), paced(progress)
        is_list = isinstance(image, list | tuple)
        is_batch = isinstance(image, Tensor) and image.ndim == 4
        images = list(image) if is_list or is_batch else [image]
        if not images:
            raise ValueError("image must hold at least one image, got an empty list")
        decoded = [decode_image(item) for item in images]
        timesteps = self._read_timesteps(timestep, decoded)
        prompts = self._read_prompts(prompt, decoded)
        sizes = [tuple(item.rgb.shape[-2:]) for item in decoded]
        generators = read_generators(generator, len(images))
        # Each image's noise must not depend on the others.
        room = self.images_at_once if generator is None else lambda *_: 1
        groups = []
        for group in same_size_ranges(sizes, lambda size: room(size, settings)):
            rows = slice(group.start, group.stop)
            at = Conditions(
                timesteps[rows], prompts[rows], self._execution_device, generators[group.start]
            )
            groups.append((decoded[rows], at))
        results = self._run(groups, settings, tiling, output_type, progress)
        if is_batch and isinstance(results[0], Tensor):
            return torch.stack(results)
        return results if is_list or is_batch else results[0]

    @torch.inference_mode(False)
    @torch.no_grad()
    def sweep(
        self,
        image: Any,
        timesteps: Sequence[int] = (1, 100, 300, 500, 700, 900),
        *,
        prompt: str | None = None,
        tiling: TileSpec | Literal["auto"] | None = "auto",
        output_type: str | None = None,
        progress: Progress | None = None,
        **settings: Any,
    ) -> list[Any]:
        """Restore one image at several timesteps; what does not depend on them is done once.

        Args:
            image: As for a call, but one image.
            timesteps: At least one; as for a call.
            prompt: As for a call.
            tiling: As for a call.
            output_type: As for a call.
            progress: As for a call.
            **settings: `scale`, `color_fix` and `process_size`, as for a call.

        Returns:
            An image per timestep, as a call with it gives.

        Raises:
            TypeError: An argument is of the wrong type.
            ValueError: An argument is out of range, or there is no timestep.
            TADSRError: The result is not finite at the model's precision.
        """
        settings, progress = UpscaleSettings(**settings), paced(progress)
        decoded = decode_image(image)
        device = self._execution_device
        whole = read_timesteps(list(timesteps), len(timesteps), self._last_timestep)
        prompts = self._read_prompts(prompt, [decoded])
        size = settings.network_size(*decoded.rgb.shape[-2:])
        groups = [
            ([decoded], Conditions(group, prompts.expand(len(group)), device))
            for group in group_timesteps(whole, size, device)
        ]
        return self._run(groups, settings, tiling, output_type, progress)

    @torch.inference_mode(False)
    @torch.no_grad()
    def upscale_to_file(
        self,
        image: Any,
        path: str | Path,
        timestep: TimestepLike = 500,
        *,
        scale: float = 4,
        prompt: str | None = None,
        color_fix: ColorFix = "adain",
        process_size: int = 512,
        tiling: TileSpec | Literal["auto"] | None = "auto",
        generator: torch.Generator | None = None,
        overwrite: bool = True,
        progress: Progress | None = None,
    ) -> None:
        """Restore and enlarge one image into a file that is written strip by strip.

        For results that are larger than memory; small ones work as well.

        Args:
            image: As for a call, but one image.
            path: PNG or TIFF, by its suffix; 16 bit if the image is.
            timestep: As for a call.
            scale: As for a call.
            prompt: As for a call.
            color_fix: As for a call.
            process_size: As for a call.
            tiling: As for a call.
            generator: As for a call.
            overwrite: Whether an existing file may be replaced.
            progress: As for a call.

        Raises:
            TypeError: An argument is of the wrong type.
            ValueError: An argument is out of range.
            TADSRError: The result is not finite, or the file cannot be written; an existing one
                is left as it was.
        """
        settings = UpscaleSettings(scale, color_fix, process_size)
        check_streamable(path)
        progress = paced(progress)
        decoded = decode_image(image)
        (generator,) = read_generators(generator, 1)
        size = settings.output_size(*decoded.rgb.shape[-2:])
        check_writable(path, overwrite=overwrite, size=size[::-1])
        timesteps = self._read_timesteps(timestep, [decoded])
        prompts = self._read_prompts(prompt, [decoded])
        at = Conditions(timesteps, prompts, self._execution_device, generator)
        strips = (
            (start, colors[0], alpha_rows(decoded, settings, start, colors))
            for start, colors in self._strips(
                stack_images([decoded]), at, settings, tiling, paced(progress)
            )
        )
        write_strips(strips, path, like=decoded, size=size, overwrite=overwrite)
        self._free_offloaded()

    def images_at_once(self, size: tuple[int, int], settings: UpscaleSettings) -> int:
        """Return how many images of a list go through the networks together, at least 1.

        Args:
            size: Their height and width in px.
            settings: What is done to them.
        """
        pixels = batch_pixels(self.vae, self._execution_device)
        return max(1, pixels // math.prod(settings.network_size(*size)))

    def encode_prompt(self, prompts: Sequence[str]) -> Tensor:
        """Return the embeddings of prompts; those that were used lately are kept.

        Args:
            prompts: B texts.

        Returns:
            (B, L, D), on the execution device.

        Raises:
            TypeError: A prompt is not a string.
            ValueError: The model has no text encoder and does not know a prompt.
        """
        return self._embed(prompts).embeds

    def _embed(self, texts: Sequence[str]) -> Prompts:
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"prompt must be text, got {type(text).__name__}")
        device = self._execution_device
        network = self.prompt_embeddings if self.text_encoder is None else self.text_encoder

        def embed(texts: list[str]) -> Tensor:
            if self.text_encoder is None:
                return self.prompt_embeddings(texts).to(device)
            return embed_texts(self.text_encoder, self.tokenizer, device, texts)

        with self._lock:
            return self._text_embeddings.of(texts, network, embed, device)

    @property
    def _last_timestep(self) -> int:
        return len(self.alphas_cumprod) - 1

    def check_timesteps(self, timestep: int | Sequence[int], num_images: int) -> Tensor:
        """Turn a user's timestep into one int64 per image, (B,), on the execution device.

        Raises:
            TypeError: A timestep is not a number.
            ValueError: A timestep is not whole or out of range, or their number is wrong.
        """
        whole = read_timesteps(timestep, num_images, self._last_timestep)
        return torch.tensor(whole, dtype=torch.int64, device=self._execution_device)

    def _read_prompts(
        self, prompt: str | Sequence[str] | None, images: Sequence[DecodedImage]
    ) -> Prompts:
        texts = choose_prompts(prompt, images, self.tagger, self.text_encoder, self.prompt_style)
        return self._embed(texts)

    def _read_timesteps(
        self, timestep: Any, decoded: Sequence[DecodedImage]
    ) -> list[int] | TimestepField:
        """Turn what a user gives into one timestep per image, or into one per position."""
        sizes = [tuple(image.rgb.shape[-2:]) for image in decoded]
        entries = read_timestep_maps(timestep, sizes, self._last_timestep)
        if entries is None:
            return read_timesteps(timestep, len(decoded), self._last_timestep)
        maps = (
            entry
            if isinstance(entry, TimestepMap)
            else TimestepMap.constant(*read_timesteps(entry, 1, self._last_timestep))
            for entry in entries
        )
        return TimestepField(tuple(maps))

    def _free_offloaded(self) -> None:
        with self._lock:
            self.maybe_free_model_hooks()

    def _run(
        self,
        groups: Sequence[tuple[list[DecodedImage], Conditions]],
        settings: UpscaleSettings,
        tiling: TileSpec | Literal["auto"] | None,
        output_type: str | None,
        progress: Progress | None,
    ) -> list[Any]:
        """Restore groups of images of one size, or of one image for all conditions of its group."""
        results = []
        for number, (images, at) in enumerate(groups):
            may_be_bytes = all(takes_bytes(image, output_type) for image in images)
            share = share_of(progress, number, len(groups))
            strips = self._strips(
                stack_images(images), at, settings, tiling, share, takes_bytes=may_be_bytes
            )
            images = images * (at.batch // len(images))
            results += assemble_images(strips, images, settings, output_type)
        self._free_offloaded()
        return results

    def _strips(
        self,
        rgb: Tensor,
        at: Conditions,
        settings: UpscaleSettings,
        tiling: TileSpec | Literal["auto"] | None,
        progress: Progress | None,
        *,
        takes_bytes: bool = False,
    ) -> Iterator[Strip]:
        """Restore images (B, 3, h, w) in [0, 1], in pieces or as a whole."""
        with self._lock:
            engine = self.engine
        strips = upscale(engine, at, rgb, settings, tiling, progress, takes_bytes=takes_bytes)
        while True:
            with self._lock:
                strip = next(strips, None)
            if strip is None:
                return
            yield strip
