"""Images restored as a whole: what comes before and after the networks, on their device."""

from __future__ import annotations

import torch
from torch import Tensor

from tadsr.color import COLOR_FIXES
from tadsr.conditioning import run_at
from tadsr.config import UpscaleSettings
from tadsr.engine import OneStepEngine
from tadsr.image_io import pad_reflect, resize_bicubic
from tadsr.kernels import adain_color_fix_uint8, to_uint8_nhwc, wavelet_color_fix_uint8
from tadsr.streaming import OneStep

_COLOR_FIXES_TO_BYTES = {
    "adain": adain_color_fix_uint8,
    "wavelet": wavelet_color_fix_uint8,
    "none": lambda image, reference: to_uint8_nhwc(image),
}


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
        rgb: Images, (B, 3, h, w), in [0, 1]; or one for all timesteps.
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
    reference = resize_bicubic(rgb.to(device), size).clamp(0, 1)
    multiple = step.vae.downscale_factor
    reference = reference.expand(len(step.prompt_embeds), -1, -1, -1)
    lq = pad_reflect(reference, -size[0] % multiple, -size[1] % multiple) * 2 - 1

    def finish(restored: Tensor) -> Tensor:
        restored = restored[..., : size[0], : size[1]]
        if ends_in_bytes:
            fix_color = _COLOR_FIXES_TO_BYTES[settings.color_fix]
            pixels = fix_color(restored, lq[..., : size[0], : size[1]])
            return _begin_to_copy(pixels).permute(0, 3, 1, 2)
        restored = restored.float() / 2 + 0.5
        fixed = COLOR_FIXES[settings.color_fix](restored, reference).clamp(0, 1)
        return resize_bicubic(fixed, output_size).clamp(0, 1)

    def restore(timesteps: Tensor) -> Tensor:
        embeds, generator = step.prompt_embeds, step.generator
        return engine.restore(lq, timesteps, embeds, generator=generator, finish=finish)

    return step.mix(run_at(step.timesteps, restore, step.generator), output_size)


def _begin_to_copy(pixels: Tensor) -> Tensor:
    """Return a copy on the host, complete once the device has done what it was given."""
    if pixels.device.type != "cuda":
        return pixels.cpu()
    copy = torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=True)
    return copy.copy_(pixels, non_blocking=True)
