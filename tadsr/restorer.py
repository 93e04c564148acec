"""Images in, images four times larger out; imports no diffusers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from tadsr.call_habits import takes_habits
from tadsr.conditioning import TimestepLike, read_conditions, read_timesteps
from tadsr.config import ColorFix, Seamless, UpscaleSettings
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
from tadsr.onestep import TileSpec, batch_pixels, group_timesteps, read_generators, same_size_ranges
from tadsr.onestep.banded import Strip
from tadsr.onestep.tasks import Task, share_of
from tadsr.onestep.upscaling import upscale, upscale_seamless
from tadsr.pipeline_base import OneStepPipeline
from tadsr.progress import Progress, paced
from tadsr.prompts import Prompts, choose_prompts

_Group: TypeAlias = tuple[list[DecodedImage], Task]
"""Images of one size and what the step on them is taken at, or one image for several of these."""


class Restorer(OneStepPipeline):
    """Restores and enlarges images by the networks that a class derived from it holds."""

    @takes_habits
    @torch.inference_mode(False)  # what is kept for later calls must outlive a caller's mode
    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        timestep: TimestepLike | Sequence[TimestepLike] | None = None,
        *,
        scale: float = 4,
        prompt: str | Sequence[str] | None = None,
        color_fix: ColorFix | None = "adain",
        process_size: int | None = None,
        tiling: TileSpec | Literal["auto"] | None = "auto",
        seamless: Seamless | None = None,
        settings: UpscaleSettings | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str | None = None,
        progress: Progress | None = None,
    ) -> Any:
        """Restore images and enlarge them.

        Args:
            image: One image or a list of them: PIL of any mode, what `read_image` gives, uint8 or
                uint16 array (H, W) or (H, W, 1|3|4), float array or tensor (3, H, W) in [0, 1],
                or a tensor batch (B, 3, H, W).
            timestep: 0..999, one for all or one per image; small is faithful, large is vivid;
                None is `default_timestep`. Or a map of timesteps over the image: a `TimestepMap`,
                a grey PIL image or array (H, W) of timesteps at any size, or regions as for
                `TimestepMap.from_regions`.
            scale: Output size over input size, any number ≥ 1; 1 restores at the given size.
            prompt: What the picture shows, one for all or one per image; None is "", which is
                neutral. A tagger's words come before it.
            color_fix: "adain", "wavelet" or None, which may be written "none".
            process_size: Smallest shorter side in px that the network works at; 0 for no limit,
                None for the model's own, `default_process_size`.
            tiling: "auto" computes large images in pieces, within the memory there is; a
                `TileSpec` sets the pieces; None never does. Up to 2048 × 2048 px of output the
                result is that of the whole.
            seamless: "x", "y" or "both" for a texture that repeats to its right, below it, or
                both, so that the result does; None for a photo.
            settings: `scale`, `color_fix`, `process_size`, `tiling` and `seamless` in one; these
                must then be left out.
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
            TypeError: An argument is of the wrong type, or given in `settings` as well.
            ValueError: An argument is out of range, or the numbers of images, timesteps, prompts
                and generators differ.
            TADSRError: The result is not finite at the model's precision.

        Source: TADSR (arXiv 2508.16557), one-step inference.
        """
        settings = self._one_of(
            settings,
            scale=scale,
            color_fix=color_fix,
            process_size=process_size,
            tiling=tiling,
            seamless=seamless,
        )
        is_list = isinstance(image, list | tuple)
        is_batch = isinstance(image, Tensor) and image.ndim == 4
        images = list(image) if is_list or is_batch else [image]
        if not images:
            raise ValueError("image must hold at least one image, got an empty list")
        decoded = [decode_image(item) for item in images]
        groups = self._group(decoded, timestep, prompt, generator, settings)
        results = self._run(groups, progress, output_type)
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
        settings: UpscaleSettings | None = None,
        output_type: str | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> list[Any]:
        """Restore one image at several timesteps; what does not depend on them is done once.

        What is not listed here is as for a call.

        Args:
            image: One image.
            timesteps: At least one.
            **options: `scale`, `color_fix`, `process_size`, `tiling` and `seamless`.

        Returns:
            An image per timestep, as a call with it gives.

        Raises:
            TypeError: An argument is of the wrong type.
            ValueError: An argument is out of range, or there is no timestep.
            TADSRError: The result is not finite at the model's precision.
        """
        settings = self._one_of(settings, **options)
        decoded = decode_image(image)
        device = self._execution_device
        whole = read_timesteps(list(timesteps), len(timesteps), self._last_timestep)
        prompts = self._read_prompts(prompt, [decoded], device)
        size = settings.network_size(*decoded.rgb.shape[-2:])
        groups = [
            ([decoded], Task(group, prompts.expand(len(group)), device, settings))
            for group in group_timesteps(whole, size, device)
        ]
        return self._run(groups, progress, output_type)

    @torch.inference_mode(False)
    @torch.no_grad()
    def upscale_to_file(
        self,
        image: Any,
        path: str | Path,
        timestep: TimestepLike | None = None,
        *,
        prompt: str | None = None,
        settings: UpscaleSettings | None = None,
        generator: torch.Generator | None = None,
        overwrite: bool = True,
        progress: Progress | None = None,
        **options: Any,
    ) -> None:
        """Restore and enlarge one image into a file that is written strip by strip.

        For results that are larger than memory; small ones work as well. What is not listed here
        is as for a call.

        Args:
            image: One image.
            path: PNG or TIFF, by its suffix; 16 bit if the image is.
            overwrite: Whether an existing file may be replaced.
            **options: `scale`, `color_fix`, `process_size`, `tiling` and `seamless`.

        Raises:
            TypeError: An argument is of the wrong type.
            ValueError: An argument is out of range.
            TADSRError: The result is not finite, or the file cannot be written; an existing one
                is left as it was.
        """
        settings = self._one_of(settings, **options)
        check_streamable(path)
        decoded = decode_image(image)
        size = settings.output_size(*decoded.rgb.shape[-2:])
        check_writable(path, overwrite=overwrite, size=size[::-1])

        def write(strips: Iterator[Strip], _: Sequence[DecodedImage]) -> tuple[()]:
            rows = (
                (start, colors[0], alpha_rows(decoded, settings, start, colors))
                for start, colors in strips
            )
            write_strips(rows, path, like=decoded, size=size)
            return ()

        groups = self._group([decoded], timestep, prompt, generator, settings)
        self._run(groups, progress, finish=write)

    def images_at_once(self, size: tuple[int, int], settings: UpscaleSettings) -> int:
        """Return how many images of a list go through the networks together, at least 1.

        Args:
            size: Their height and width in px.
            settings: What is done to them.
        """
        pixels = batch_pixels(self.vae, self._execution_device)
        settings = settings.of_model(self.default_process_size)
        sides = zip(settings.network_size(*size), settings.margins_px, strict=True)
        return max(1, pixels // math.prod(side + 2 * margin for side, margin in sides))

    def _one_of(self, settings: UpscaleSettings | None, **options: Any) -> UpscaleSettings:
        """Return the settings of a call, given as a whole or one by one."""
        made = UpscaleSettings(**options)
        if settings is None:
            return made.of_model(self.default_process_size)
        plain = vars(UpscaleSettings())
        beside = [name for name, value in vars(made).items() if value != plain[name]]
        if beside:
            raise TypeError(
                f"settings must hold {', '.join(beside)}, which came beside it; change them in it "
                "by dataclasses.replace"
            )
        return settings.of_model(self.default_process_size)

    def _read_prompts(
        self,
        prompt: str | Sequence[str] | None,
        images: Sequence[DecodedImage],
        device: torch.device,
    ) -> Prompts:
        for name in ("vae", "unet"):
            self._check_part(name)
        texts = choose_prompts(prompt, images, self.tagger, self.text_encoder, self.prompt_style)
        return self._embed(texts, device)

    def _group(
        self,
        images: list[DecodedImage],
        timestep: Any,
        prompt: str | Sequence[str] | None,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        settings: UpscaleSettings,
    ) -> list[_Group]:
        """Read what images are restored at, and group neighbours of one size."""
        sizes = [tuple(image.rgb.shape[-2:]) for image in images]
        if timestep is None:
            timestep = self.default_timestep
        timesteps = read_conditions(timestep, sizes, self._last_timestep)
        device = self._execution_device  # looked for among all hooks: once a call
        prompts = self._read_prompts(prompt, images, device)
        generators = read_generators(generator, len(images))
        # Each image's noise must not depend on the others.
        is_alone = len(images) == 1 or generator is not None
        room = (lambda *_: 1) if is_alone else self.images_at_once
        groups = []
        for group in same_size_ranges(sizes, lambda size: room(size, settings)):
            rows = slice(group.start, group.stop)
            generator = generators[group.start]
            task = Task(timesteps[rows], prompts[rows], device, settings, generator)
            groups.append((images[rows], task))
        return groups

    def _run(
        self,
        groups: Sequence[_Group],
        progress: Progress | None,
        output_type: str | None = None,
        finish: Callable[[Iterator[Strip], Sequence[DecodedImage]], Iterable[Any]] | None = None,
    ) -> list[Any]:
        """Restore groups, and make of each group's strips images, or what `finish` does."""
        progress = None if progress is None else paced(progress)
        results: list[Any] = []
        for number, (images, task) in enumerate(groups):
            task = replace(
                task,
                rgb=stack_images(images),
                progress=share_of(progress, number, len(groups)),
                takes_bytes=finish is None and all(takes_bytes(i, output_type) for i in images),
            )
            assemble = partial(assemble_images, settings=task.settings, output_type=output_type)
            images = images * (task.batch // len(images))
            results += (finish or assemble)(self._strips(task), images)
        with self._lock:
            self.maybe_free_model_hooks()
        return results

    def _strips(self, task: Task) -> Iterator[Strip]:
        """Restore images, in pieces or as a whole."""
        with self._lock:
            engine = self.engine
        strips = (upscale if task.settings.seamless is None else upscale_seamless)(engine, task)
        while True:
            with self._lock:
                strip = next(strips, None)
            if strip is None:
                return
            yield strip
