"""Images restored and enlarged: as a whole, or in bands where that does not fit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from tadsr.color import COLOR_FIXES
from tadsr.conditioning import run_at
from tadsr.config import UpscaleSettings
from tadsr.errors import TADSRWarning
from tadsr.images import pad_reflect, resize_bicubic
from tadsr.kernels import adain_color_fix_uint8, to_uint8_nhwc, wavelet_color_fix_uint8
from tadsr.onestep.banded import OneStep, Strip, planned_bytes, upscale_in_strips
from tadsr.onestep.banded_unet import check_unet
from tadsr.onestep.memory import available_bytes, is_out_of_memory
from tadsr.onestep.step import OneStepEngine
from tadsr.onestep.tile_spec import WHOLE_ATTENTION_PIXELS, TileSpec
from tadsr.progress import Progress

BANDS_ON_CPU_PIXELS = 512 * 512
"""Above this area of the output bands are faster than the whole on a CPU."""
EAGER_MEMORY_FACTOR = 4
"""Peak memory of the whole computation over what bands keep between layers, with a margin."""
_COLOR_FIXES_TO_BYTES = {
    "adain": adain_color_fix_uint8,
    "wavelet": wavelet_color_fix_uint8,
    "none": lambda image, reference: to_uint8_nhwc(image),
}


def upscale(
    engine: OneStepEngine,
    step: OneStep,
    rgb: Tensor,
    settings: UpscaleSettings,
    tiling: TileSpec | Literal["auto"] | None,
    progress: Progress | None = None,
    *,
    takes_bytes: bool = False,
) -> Iterator[Strip]:
    """Restore and enlarge images as a whole or in pieces.

    Args:
        engine: As for `upscale_whole`.
        step: As for `upscale_whole`.
        rgb: As for `upscale_whole`.
        settings: As for `upscale_whole`.
        tiling: As for `choose_tiling`; with "auto", what does not fit as a whole is cut.
        progress: As for `upscale_in_strips`.
        takes_bytes: As for `upscale_whole`.

    Yields:
        As `upscale_in_strips`, or the whole.

    Raises:
        TADSRError: As `upscale_in_strips`.
    """
    spec = choose_tiling(tiling, step, rgb, settings)
    if spec is None:
        try:
            result = upscale_whole(engine, step, rgb, settings, takes_bytes=takes_bytes)
        except (RuntimeError, MemoryError) as error:
            is_cut = tiling == "auto" and can_be_cut(rgb, settings) and is_out_of_memory(error)
            if not is_cut:
                raise
        else:
            yield 0, result
            if progress is not None:
                progress(1.0)
            return
        # Not in the handler, which holds what the computation left.
        warnings.warn(
            "memory ran out for the image as a whole, so that it is computed in pieces; "
            "tiling=TileSpec() or --max-memory avoids the first try",
            TADSRWarning,
            stacklevel=3,
        )
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        spec = TileSpec()
    yield from upscale_in_strips(step, rgb, settings, spec, progress)


def upscale_whole(
    engine: OneStepEngine,
    step: OneStep,
    rgb: Tensor,
    settings: UpscaleSettings,
    *,
    takes_bytes: bool = False,
) -> Tensor:
    """Restore and enlarge images with everything in between on one device.

    Args:
        engine: Runs the networks of `step`.
        step: Networks and conditions.
        rgb: As for `upscale_in_strips`.
        settings: Scale, colour fix and smallest size.
        takes_bytes: Whether the result may be bytes in the memory of the host, as it is where
            the colour fix comes last.

    Returns:
        (B, 3, H, W): float32 in [0, 1], on the device; or uint8, on the host.

    Raises:
        TADSRError: The result is not finite at the model's precision.
    """
    device = step.timesteps.device
    height, width = rgb.shape[-2:]
    size, output_size = settings.network_size(height, width), settings.output_size(height, width)
    ends_in_bytes = takes_bytes and size == output_size and isinstance(step.timesteps, Tensor)
    enlarged = resize_bicubic(rgb.to(device), size).clamp(0, 1)
    multiple = step.vae.downscale_factor
    enlarged = enlarged.expand(len(step.prompt_embeds), -1, -1, -1)
    reference, fix_color = enlarged[:, :3], COLOR_FIXES[settings.color_fix]
    if settings.color_fix == "adain" and enlarged.shape[1] == 4:
        ends_in_bytes, fix_color = False, partial(fix_color, weights=enlarged[:, 3:])
    lq = pad_reflect(reference, -size[0] % multiple, -size[1] % multiple) * 2 - 1

    def finish(restored: Tensor) -> Tensor:
        restored = restored[..., : size[0], : size[1]]
        if ends_in_bytes:
            to_bytes = _COLOR_FIXES_TO_BYTES[settings.color_fix]
            pixels = to_bytes(restored, lq[..., : size[0], : size[1]])
            return _begin_to_copy(pixels).permute(0, 3, 1, 2)
        restored = restored.float() / 2 + 0.5
        fixed = fix_color(restored, reference).clamp(0, 1)
        return resize_bicubic(fixed, output_size).clamp(0, 1)

    def restore(timesteps: Tensor) -> Tensor:
        embeds, generator = step.prompt_embeds, step.generator
        return engine.restore(lq, timesteps, embeds, generator=generator, finish=finish)

    return step.mix(run_at(step.timesteps, restore, step.generator), output_size)


def choose_tiling(
    tiling: TileSpec | Literal["auto"] | None,
    step: OneStep,
    rgb: Tensor,
    settings: UpscaleSettings,
) -> TileSpec | None:
    """Decide whether images are computed in pieces.

    Args:
        tiling: A choice, None for never, or "auto".
        step: Networks and conditions.
        rgb: Images, (B, 3, h, w).
        settings: Scale and smallest size.

    Returns:
        The pieces' sizes, or None for the images as a whole.

    Raises:
        TypeError: `tiling` is none of these.
        ValueError: Pieces are asked for and the UNet has other blocks than Stable Diffusion's.
    """
    if tiling is not None and tiling != "auto" and not isinstance(tiling, TileSpec):
        raise TypeError(f'tiling must be "auto", None or a TileSpec, got {tiling!r}')
    if tiling is None or not can_be_cut(rgb, settings):
        return None
    if tiling == "auto":
        if not _needs_bands(step, rgb, settings):
            return None
        tiling = TileSpec()
    check_unet(step.unet)
    return tiling


def can_be_cut(rgb: Tensor, settings: UpscaleSettings) -> bool:
    """Tell whether images (B, 3, h, w) can be computed in pieces.

    What is enlarged for the network cannot, and is small.
    """
    size = rgb.shape[-2:]
    return settings.network_size(*size) == settings.output_size(*size)


def _needs_bands(step: OneStep, rgb: Tensor, settings: UpscaleSettings) -> bool:
    height, width = settings.output_size(*rgb.shape[-2:])
    device = step.timesteps.device
    if device.type == "cpu":
        # Exact all the same, and faster where a band fits the caches.
        return height * width > BANDS_ON_CPU_PIXELS
    if height * width > WHOLE_ATTENTION_PIXELS:
        return True
    return EAGER_MEMORY_FACTOR * planned_bytes(step, rgb, settings) > available_bytes(device)


def _begin_to_copy(pixels: Tensor) -> Tensor:
    """Return a copy on the host, complete once the device has done what it was given."""
    if pixels.device.type != "cuda":
        return pixels.cpu()
    copy = torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=True)
    return copy.copy_(pixels, non_blocking=True)
