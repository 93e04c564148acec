"""Images restored and enlarged: as a whole, or in bands where that does not fit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count

import torch
from torch import Tensor

from tadsr.color import COLOR_FIXES
from tadsr.conditioning import TimestepField, run_at
from tadsr.config import UpscaleSettings
from tadsr.errors import TADSRWarning
from tadsr.images import pad_reflect, resize_bicubic
from tadsr.kernels import adain_color_fix_uint8, to_uint8_nhwc, wavelet_color_fix_uint8
from tadsr.onestep.banded import Strip, upscale_in_strips
from tadsr.onestep.choose import can_be_cut, choose_way
from tadsr.onestep.conditions import Conditions
from tadsr.onestep.memory import is_out_of_memory
from tadsr.onestep.step import OneStepEngine
from tadsr.progress import Progress, share_of
from tadsr.tile_spec import TileSpec

_COLOR_FIXES_TO_BYTES = {
    "adain": adain_color_fix_uint8,
    "wavelet": wavelet_color_fix_uint8,
    "none": lambda image, reference: to_uint8_nhwc(image),
}


def upscale(
    engine: OneStepEngine,
    conditions: Conditions,
    rgb: Tensor,
    settings: UpscaleSettings,
    progress: Progress | None = None,
    *,
    takes_bytes: bool = False,
) -> Iterator[Strip]:
    """Restore and enlarge images as a whole or in pieces."""
    way = choose_way(engine, conditions, rgb, settings)
    spec = way.spec
    if spec is None:
        is_cut = settings.tiling == "auto" and can_be_cut(rgb, settings)
        try:
            result = upscale_whole(
                engine, conditions, rgb, settings, progress, takes_bytes=takes_bytes
            )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or not (is_cut or conditions.batch > 1):
                raise
        else:
            yield 0, result
            if progress is not None:
                progress(1.0)
            return
        # Not in the handler, which holds what the computation left.
        engine.drop_graphs()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        if conditions.batch > 1:
            yield 0, _upscale_halves(engine, conditions, rgb, settings, takes_bytes)
            return
        warnings.warn(
            "memory ran out for the image as a whole, so that it is computed in pieces; "
            "tiling=TileSpec() or --max-memory avoids the first try",
            TADSRWarning,
            stacklevel=3,
        )
        spec = TileSpec()
    else:
        engine.warn_of_bands(way.reason)
    yield from upscale_in_strips(engine, conditions, rgb, settings, spec, progress)


def _upscale_halves(
    engine: OneStepEngine,
    conditions: Conditions,
    rgb: Tensor,
    settings: UpscaleSettings,
    takes_bytes: bool,
) -> Tensor:
    """Restore the two halves of a batch, which need half as much memory, one after the other."""
    middle = conditions.batch // 2
    halves = []
    for images in (slice(None, middle), slice(middle, None)):
        part = rgb[images] if len(rgb) > 1 else rgb
        strips = upscale(engine, conditions[images], part, settings, takes_bytes=takes_bytes)
        halves.append(torch.cat([rows for _, rows in strips], dim=2))
    # Bytes and floats where one of the halves was cut.
    if halves[0].dtype != halves[1].dtype:
        halves = [half / 255 if half.dtype == torch.uint8 else half.cpu() for half in halves]
    return torch.cat(halves)


def upscale_whole(
    engine: OneStepEngine,
    conditions: Conditions,
    rgb: Tensor,
    settings: UpscaleSettings,
    progress: Progress | None = None,
    *,
    takes_bytes: bool = False,
) -> Tensor:
    """Restore and enlarge images with everything in between on one device.

    Returns:
        (B, 3, H, W): float32 in [0, 1], on the device; or uint8, on the host.
    """
    device = conditions.device
    height, width = rgb.shape[-2:]
    size, output_size = settings.network_size(height, width), settings.output_size(height, width)
    is_map = isinstance(conditions.timesteps, TimestepField)
    ends_in_bytes = takes_bytes and size == output_size and not is_map
    enlarged = resize_bicubic(rgb.to(device), size).clamp(0, 1)
    multiple = engine.vae.downscale_factor
    enlarged = enlarged.expand(conditions.batch, -1, -1, -1)
    reference, fix_color = enlarged[:, :3], COLOR_FIXES[settings.color_fix]
    if settings.color_fix == "adain" and enlarged.shape[1] == 4:
        ends_in_bytes, fix_color = False, partial(fix_color, weights=enlarged[:, 3:])
    lq = pad_reflect(reference, -size[0] % multiple, -size[1] % multiple)
    lq = torch.rsub(lq, -1, alpha=-2)  # 2·lq - 1, in one kernel

    def finish(restored: Tensor) -> Tensor:
        restored = restored[..., : size[0], : size[1]]
        if ends_in_bytes:
            to_bytes = _COLOR_FIXES_TO_BYTES[settings.color_fix]
            pixels = to_bytes(restored, lq[..., : size[0], : size[1]])
            return _begin_to_copy(pixels).permute(0, 3, 1, 2)
        restored = restored.float().clamp(-1, 1) / 2 + 0.5
        fixed = fix_color(restored, reference).clamp(0, 1)
        return resize_bicubic(fixed, output_size).clamp(0, 1)

    steps = len(conditions.timesteps.knots) if is_map else 1
    number = count()

    def restore(timesteps: Sequence[int]) -> Tensor:
        return engine.restore(
            lq,
            timesteps,
            conditions.prompts,
            generator=conditions.generator,
            finish=finish,
            progress=share_of(progress, next(number), steps),
        )

    results = run_at(conditions.timesteps, restore, conditions.generator)
    return conditions.mix(results, output_size)


def _begin_to_copy(pixels: Tensor) -> Tensor:
    """Return a copy on the host, complete once the device has done what it was given."""
    if pixels.device.type != "cuda":
        return pixels.cpu()
    copy = torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=True)
    return copy.copy_(pixels, non_blocking=True)
