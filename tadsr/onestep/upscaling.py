"""Images restored and enlarged: as a whole, in bands where that does not fit, or as a texture."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import count

import torch
from torch import Tensor

from tadsr.color import COLOR_FIXES
from tadsr.conditioning import TimestepField, TimestepMap, run_at
from tadsr.config import UpscaleSettings
from tadsr.errors import TADSRWarning
from tadsr.heap import give_back_freed_memory
from tadsr.images import pad_reflect, pad_wrap, resize_bicubic, resize_wrapped
from tadsr.kernels import adain_color_fix_uint8, to_uint8_nhwc, wavelet_color_fix_uint8
from tadsr.onestep.banded import Strip, count_kept_bytes, upscale_in_strips
from tadsr.onestep.step import OneStepEngine
from tadsr.onestep.tasks import Task, available_bytes, is_out_of_memory, share_of
from tadsr.tile_spec import MIB, WHOLE_ATTENTION_PIXELS, TileSpec

FUSED_MEMORY_FACTOR = 2.3
"""Peak memory of the whole over what bands keep between layers: measured 2.2 to 2.3 on a CPU with
tadsr-tiny at 512² to 1024² px, and 1.2 to 1.55 with networks of 8 latents."""
PLAIN_MEMORY_FACTOR = 3.9
"""The same of plain modules: measured 2.4 to 3.8, and 1.8 to 2.8."""
_SHARE_OF_AVAILABLE = 0.7
_PLENTY = 2
"""Times the memory needed, from which on what is kept of images of other sizes is no matter."""


def choose_pieces(engine: OneStepEngine, task: Task) -> tuple[TileSpec, str] | None:
    """Return the pieces that images are computed in, and why; None for the images as a whole.

    Left to itself this is only where the whole does not fit: where it does it is the fastest, on a
    CPU as on a GPU.
    """
    tiling = task.settings.tiling
    if tiling is not None and tiling != "auto" and not isinstance(tiling, TileSpec):
        raise TypeError(f'tiling must be "auto", None or a TileSpec, got {tiling!r}')
    if tiling is None or not task.can_be_cut:
        return None
    if isinstance(tiling, TileSpec):
        return tiling, "a TileSpec is given"
    try:
        needed = planned_bytes(engine, task)
    except ValueError:  # the UNet has blocks that bands do not know
        return None
    height, width = task.output_size
    if height * width > WHOLE_ATTENTION_PIXELS:
        return TileSpec(), f"its {width} × {height} px are more than the UNet attends to at once"
    is_fused = engine.is_fused(task.output_size)
    needed = int(needed * (FUSED_MEMORY_FACTOR if is_fused else PLAIN_MEMORY_FACTOR))
    room = _room(engine, task)
    if _PLENTY * needed > room:
        give_back_freed_memory()  # of images before this one
        room = _room(engine, task)
    if needed <= room:
        return None
    reason = f"the whole would take about {needed // MIB} MiB of {room // MIB} there are"
    return TileSpec(), reason


def _room(engine: OneStepEngine, task: Task) -> int:
    # Of the graphs' memory torch says that it can be used again.
    return int(_SHARE_OF_AVAILABLE * (available_bytes(task.device) - engine.graph_bytes))


def planned_bytes(engine: OneStepEngine, task: Task) -> int:
    """Return what bands keep between layers at the most; counted once for a size."""
    # Counting walks through every layer, which takes longer than a GPU computes a small image.
    key = (task.batch, task.num_runs, *task.output_size)
    return engine.remember(key, lambda: count_kept_bytes(engine, task))


_COLOR_FIXES_TO_BYTES = {
    "adain": adain_color_fix_uint8,
    "wavelet": wavelet_color_fix_uint8,
    "none": lambda image, reference: to_uint8_nhwc(image),
}


def upscale(engine: OneStepEngine, task: Task) -> Iterator[Strip]:
    """Restore and enlarge images as a whole or in pieces."""
    pieces = choose_pieces(engine, task)
    if pieces is None:
        is_cut = task.settings.tiling == "auto" and task.can_be_cut
        try:
            result = upscale_whole(engine, task)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or not (is_cut or task.batch > 1):
                raise
        else:
            yield 0, result
            if task.progress is not None:
                task.progress(1.0)
            return
        # Not in the handler, which holds what the computation left.
        engine.drop_graphs()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        if task.batch > 1:
            yield 0, _upscale_halves(engine, task)
            return
        warnings.warn(
            "memory ran out for the image as a whole, so that it is computed in pieces; "
            "tiling=TileSpec() or --max-memory avoids the first try",
            TADSRWarning,
            stacklevel=3,
        )
        spec = TileSpec()
    else:
        spec, reason = pieces
        engine.warn_of_bands(reason)
    give_back_freed_memory()  # of images before, or of what did not fit
    yield from upscale_in_strips(engine, task, spec)


def _upscale_halves(engine: OneStepEngine, task: Task) -> Tensor:
    """Restore the two halves of a batch, which need half as much memory, one after the other."""
    middle, halves = task.batch // 2, []
    for images in (slice(None, middle), slice(middle, None)):
        strips = upscale(engine, replace(task[images], progress=None))
        halves.append(torch.cat([rows for _, rows in strips], dim=2))
    # Bytes and floats where one of the halves was cut.
    if halves[0].dtype != halves[1].dtype:
        halves = [half / 255 if half.dtype == torch.uint8 else half.cpu() for half in halves]
    return torch.cat(halves)


def upscale_whole(engine: OneStepEngine, task: Task) -> Tensor:
    """Restore and enlarge images with everything in between on one device.

    Returns:
        (B, 3, H, W): float32 in [0, 1], on the device; or uint8, on the host.
    """
    size, output_size, color_fix = task.network_size, task.output_size, task.settings.color_fix
    is_map = isinstance(task.timesteps, TimestepField)
    ends_in_bytes = task.takes_bytes and size == output_size and not is_map
    enlarged = resize_bicubic(task.rgb.to(task.device), size).clamp(0, 1)
    multiple = engine.downscale_factor
    enlarged = enlarged.expand(task.batch, -1, -1, -1)
    reference, fix_color = enlarged[:, :3], COLOR_FIXES[color_fix]
    if color_fix == "adain" and enlarged.shape[1] == 4:
        ends_in_bytes, fix_color = False, partial(fix_color, weights=enlarged[:, 3:])
    lq = pad_reflect(reference, -size[0] % multiple, -size[1] % multiple)
    lq = torch.rsub(lq, -1, alpha=-2)  # 2·lq - 1, in one kernel

    def finish(restored: Tensor) -> Tensor:
        restored = restored[..., : size[0], : size[1]]
        if ends_in_bytes:
            pixels = _COLOR_FIXES_TO_BYTES[color_fix](restored, lq[..., : size[0], : size[1]])
            return _begin_to_copy(pixels).permute(0, 3, 1, 2)
        restored = restored.float().clamp(-1, 1) / 2 + 0.5
        fixed = fix_color(restored, reference).clamp(0, 1)
        return resize_bicubic(fixed, output_size).clamp(0, 1)

    number = count()

    def restore(timesteps: Sequence[int]) -> Tensor:
        return engine.restore(
            lq,
            timesteps,
            task.prompts,
            generator=task.generator,
            finish=finish,
            progress=share_of(task.progress, next(number), task.num_runs),
        )

    return task.mix(run_at(task.timesteps, restore, task.generator), output_size)


def _begin_to_copy(pixels: Tensor) -> Tensor:
    """Return a copy on the host, complete once the device has done what it was given."""
    if pixels.device.type != "cuda":
        return pixels.cpu()
    copy = torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=True)
    return copy.copy_(pixels, non_blocking=True)


def upscale_seamless(engine: OneStepEngine, task: Task) -> Iterator[Strip]:
    """Restore and enlarge images that repeat; as `upscale`, in `settings.seamless`'s directions."""
    settings, size, output_size = task.settings, task.network_size, task.output_size
    wraps, margins = settings.wraps, settings.margins_px
    # Latents must repeat as well.
    multiple = engine.downscale_factor
    size = tuple(
        -(-side // multiple) * multiple if wrap else side
        for side, wrap in zip(size, wraps, strict=True)
    )
    enlarged = resize_wrapped(task.rgb, size, wraps).clamp(0, 1)
    timesteps = task.timesteps
    if isinstance(timesteps, TimestepField):
        timesteps = TimestepField(tuple(extend_map(m, size, settings) for m in timesteps.maps))
    plain = replace(settings, scale=1, process_size=0, seamless=None)
    rgb = pad_wrap(enlarged, margins)
    task = replace(task, rgb=rgb, timesteps=timesteps, settings=plain, takes_bytes=False)
    strips = upscale(engine, task)
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
    values = pad_wrap(middle[None, None], settings.margins_px)[0, 0]
    return TimestepMap(values, timestep_map.named)


def _cropped(
    strips: Iterable[Strip], size: tuple[int, int], margins: tuple[int, int]
) -> Iterator[Strip]:
    (height, width), (top, left) = size, margins
    for start, rows in strips:
        first, last = max(start, top), min(start + rows.shape[2], top + height)
        if first < last:
            yield first - top, rows[:, :, first - start : last - start, left : left + width]
