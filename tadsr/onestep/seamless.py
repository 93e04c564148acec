"""Textures that tile: what lies beyond an edge is what lies inside the opposite one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from tadsr.conditioning import TimestepField, TimestepMap
from tadsr.config import UpscaleSettings
from tadsr.images import pad_wrap, resize_wrapped
from tadsr.onestep.banded import Strip
from tadsr.onestep.conditions import Conditions
from tadsr.onestep.step import OneStepEngine
from tadsr.onestep.whole import upscale
from tadsr.progress import Progress

MARGIN_PX = 128
"""What is computed beyond each edge, where the networks still see that there is one."""


def margins_of(settings: UpscaleSettings) -> tuple[int, int]:
    """Return what is computed above and below, and to the left and right, in px."""
    across_y, across_x = settings.wraps
    return MARGIN_PX * across_y, MARGIN_PX * across_x


def upscale_seamless(
    engine: OneStepEngine,
    conditions: Conditions,
    rgb: Tensor,
    settings: UpscaleSettings,
    progress: Progress | None = None,
) -> Iterator[Strip]:
    """Restore and enlarge images that repeat; as `upscale`, in `settings.seamless`'s directions."""
    wraps, margins = settings.wraps, margins_of(settings)
    size, output_size = (
        of(*rgb.shape[-2:]) for of in (settings.network_size, settings.output_size)
    )
    # Latents must repeat as well.
    multiple = engine.vae.downscale_factor
    size = tuple(
        -(-side // multiple) * multiple if wrap else side
        for side, wrap in zip(size, wraps, strict=True)
    )
    enlarged = resize_wrapped(rgb, size, wraps).clamp(0, 1)
    if isinstance(conditions.timesteps, TimestepField):
        maps = tuple(extend_map(map, size, settings) for map in conditions.timesteps.maps)
        conditions = replace(conditions, timesteps=TimestepField(maps))
    plain = replace(settings, scale=1, process_size=0, seamless=None)
    strips = upscale(engine, conditions, pad_wrap(enlarged, margins), plain, progress)
    cropped = _cropped(strips, size, margins)
    if size == output_size:
        yield from cropped
        return
    whole = torch.cat([rows for _, rows in cropped], dim=2)
    yield 0, resize_wrapped(whole, output_size, wraps).clamp(0, 1)


def extend_map(
    timestep_map: TimestepMap, size: tuple[int, int], settings: UpscaleSettings
) -> TimestepMap:
    """Return the map of an image of a size together with its margins."""
    repeats = [3 if wrap else 1 for wrap in settings.wraps]
    tiled = TimestepMap(timestep_map.values.repeat(*repeats))
    height, width = size
    wide = tiled.at(repeats[0] * height, repeats[1] * width)
    top, left = (side * (repeat // 2) for side, repeat in zip(size, repeats, strict=True))
    middle = wide[top : top + height, left : left + width]
    values = pad_wrap(middle[None, None], margins_of(settings))[0, 0]
    return TimestepMap(values, timestep_map.named)


def _cropped(
    strips: Iterable[Strip], size: tuple[int, int], margins: tuple[int, int]
) -> Iterator[Strip]:
    (height, width), (top, left) = size, margins
    for start, rows in strips:
        first, last = max(start, top), min(start + rows.shape[2], top + height)
        if first < last:
            yield first - top, rows[:, :, first - start : last - start, left : left + width]
