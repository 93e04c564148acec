"""Whether the fused engine is right on this GPU, and which engine is the fastest: found once."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tadsr.errors import TADSRWarning
from tadsr.kernels import adain_color_fix_uint8, to_uint8_nhwc, wavelet_color_fix_uint8
from tadsr.kernels.backends import disable_kernels, failure_on
from tadsr.machine import machine_key, recall, remember
from tadsr.onestep.graphs import MAX_ERROR, relative_error
from tadsr.onestep.plan import EnginePlan
from tadsr.onestep.stages import EagerStages, FusedStages
from tadsr.prompts import Prompts

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from tadsr.networks.time_aware_vae import TimeAwareAutoencoderKL

MAX_ODD_BYTES = 0.02
"""Largest share of a colour fix's bytes that may differ, by one."""
WHOLE_PIXELS = 2**20
"""Largest output that is compared as a whole, in px; of others a corner is."""
CROP_PX = 256

_verdicts: dict[tuple[torch.device, str], str | None] = {}
"""Why the fused engine is not used for networks on a device; None where it is right."""


def is_distrusted(
    vae: TimeAwareAutoencoderKL, unet: UNet2DConditionModel, plan: EnginePlan
) -> bool:
    """Tell whether the fused engine was wrong for such networks on their device."""
    is_gpu = unet.device.type == "cuda"
    return is_gpu and _verdicts.get(_key_of(vae, unet, plan)) is not None


def is_settled(fused: FusedStages) -> bool:
    """Tell whether networks of this kind were compared on this device, or need not be."""
    if fused.unet.device.type != "cuda":
        return True
    key = _key_of(fused.vae, fused.unet, fused.plan)
    if key not in _verdicts and recall("trusted", key[1]):
        _verdicts[key] = None
    return key in _verdicts


def settle(
    fused: FusedStages,
    plain: EagerStages,
    lq: Tensor,
    timesteps: Sequence[int],
    prompts: Prompts,
) -> bool:
    """Compare the fused stages with plain modules on an image, and keep the verdict.

    Where they differ or fail, kernels are disabled on the device, with one warning.

    Args:
        lq: (B, 3, H, W), in [-1, 1]; the first is looked at.
    """
    key = _key_of(fused.vae, fused.unet, fused.plan)
    unrecorded = copy.copy(fused)
    unrecorded.graphs = None
    lq = lq[:1]
    if lq.shape[2] * lq.shape[3] > WHOLE_PIXELS:
        lq = lq[..., :CROP_PX, :CROP_PX]
    try:
        reason = _difference(unrecorded, plain, lq, timesteps[:1], prompts[:1])
    except torch.OutOfMemoryError:
        return True  # says nothing; the next image may be smaller
    has_kernels = fused.plan.fused_kernels
    if has_kernels and failure_on(lq.device) is not None:
        return False  # a kernel failed, which was said
    _verdicts[key] = reason
    if reason is None:
        remember("trusted", key[1], True)
    elif has_kernels:
        disable_kernels(lq.device, reason)
    else:
        warnings.warn(
            f"the fused engine is not used on {lq.device} ({reason}); plain modules compute the "
            "same, slower; please report it with what `tadsr doctor --check --json` prints",
            TADSRWarning,
            stacklevel=2,
        )
    return reason is None


def _difference(
    fused: FusedStages,
    plain: EagerStages,
    lq: Tensor,
    timesteps: Sequence[int],
    prompts: Prompts,
) -> str | None:
    """Return how a stage fails or differs, given the same inputs; None if none does."""

    def latents_of(moments: Tensor) -> Tensor:
        return moments.chunk(2, dim=1)[0] * plain.vae.config.scaling_factor

    stages: dict[str, Callable[[FusedStages | EagerStages, Tensor], object]] = {
        "encoder": lambda stages, x: stages.encode(x, timesteps),
        "UNet": lambda stages, x: stages.predict_x0(latents_of(x), timesteps, prompts),
        "decoder": lambda stages, x: stages.decode(x),
    }
    x = lq
    for name, run in stages.items():
        expected, largest = run(plain, x)
        if not largest < torch.inf:
            return None  # overflows either way, and is done again in a wider type
        try:
            found = run(fused, x).values
            error = relative_error(found, expected)
        except torch.OutOfMemoryError:
            raise
        except Exception as failure:
            return f"the {name} fails: {type(failure).__name__}: {str(failure)[:200]}"
        if not error < MAX_ERROR:
            return f"the {name} differs from plain modules by {100 * error:.3g} %"
        x = expected
    return _odd_colors(x, lq) if fused.plan.fused_kernels else None


def _odd_colors(image: Tensor, reference: Tensor) -> str | None:
    ends: dict[str, Callable[..., Tensor]] = {
        "adain": adain_color_fix_uint8,
        "wavelet": wavelet_color_fix_uint8,
        "no": lambda image, _, **options: to_uint8_nhwc(image, **options),
    }
    for name, end in ends.items():
        found = end(image, reference).short()
        difference = (found - end(image, reference, backend="reference").short()).abs()
        is_right = (difference.max() <= 1) & (difference.float().mean() < MAX_ODD_BYTES)
        if not is_right:
            return f"the end with {name} colour fix gives wrong bytes"
    return None


def remember_fastest(
    vae: TimeAwareAutoencoderKL,
    unet: UNet2DConditionModel,
    multiplied: torch.dtype | None,
    engine: str,
) -> None:
    """Have "auto" take an engine for networks of this kind on their device from now on.

    Args:
        multiplied: As in `EnginePlan`.
    """
    remember("fastest", _key_of(vae, unet, multiplied)[1], engine)


def recall_fastest(
    vae: TimeAwareAutoencoderKL, unet: UNet2DConditionModel, multiplied: torch.dtype | None
) -> str | None:
    """Return the engine that was measured to be the fastest for networks of this kind, or None."""
    return recall("fastest", _key_of(vae, unet, multiplied)[1])


def _key_of(
    vae: TimeAwareAutoencoderKL, unet: UNet2DConditionModel, *further: object
) -> tuple[torch.device, str]:
    # Sorted, since bare layers have the order of their file.
    tensors = (
        (name, tuple(tensor.shape))
        for network in (vae, unet)
        for name, tensor in sorted(network.named_parameters(), key=lambda pair: pair[0])
    )
    # What no shape tells.
    heads, groups = unet.config.attention_head_dim, unet.config.norm_num_groups
    heads = tuple(heads) if isinstance(heads, list | tuple) else heads
    return unet.device, machine_key(unet.device, unet.dtype, *further, heads, groups, *tensors)
