"""Whether a CPU multiplies in bfloat16: where it has instructions for it and they are faster."""

from __future__ import annotations

import functools
import re
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from tadsr.machine import machine_key, recall, remember

FAST_FLAGS = {"amx_bf16", "avx512_bf16", "bf16"}
"""Names of the instructions in /proc/cpuinfo, on x86 and on Arm."""
MAX_SHARE = 0.8
"""Largest share of float32's time that bfloat16 may take to be worth its rounding."""
_EXACT = re.compile(
    # What enters and leaves a network, the first blocks,
    r"(encoder\.|decoder\.)?conv_(in|out)|(post_)?quant_conv"
    r"|(encoder\.)?down_blocks\.0\.(resnets|attentions)\.0\..*"
    # and what all features pass before the decoder, where no other branch dampens its rounding.
    r"|(?!decoder\.).*(conv_shortcut|downsamplers\.0\.conv|proj_in|proj_out|attn1\.to_out\.0)"
)
_CHANNELS, _SIDE = 64, 128
_REPETITIONS = 5


class Products(NamedTuple):
    """The type in which the fused engine multiplies."""

    multiplied: torch.dtype | None
    """None for the weights' own."""
    reason: str
    """Why, as part of a sentence."""


@functools.cache
def cpu_instructions() -> frozenset[str]:
    """Return those of `FAST_FLAGS` that this processor has."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = re.findall(r"^(?:flags|Features)\s*:(.*)$", info.read_text(), re.M)
        return frozenset(lines[0].split() if lines else ()) & FAST_FLAGS
    names = {"amx_bf16": "_is_amx_tile_supported", "avx512_bf16": "_is_avx512_bf16_supported"}
    return frozenset(flag for flag, name in names.items() if getattr(torch.cpu, name, bool)())


def choose_products(device: torch.device, dtype: torch.dtype) -> Products:
    """Choose for weights of a type on a device, by a measurement at first use.

    What was measured is remembered until processor, threads, torch or this package change.
    """
    if device.type != "cpu" or dtype != torch.float32:
        return Products(None, f"weights of {str(dtype).removeprefix('torch.')} on {device.type}")
    if not cpu_instructions():
        return Products(None, "the processor has no instructions for bfloat16")
    key = machine_key(device, torch.bfloat16)
    share = recall("bfloat16", key)
    if not isinstance(share, float):
        share = measured_share()
        remember("bfloat16", key, share)
    reason = f"a convolution in bfloat16 takes {share:.2f} of float32's time"
    return Products(torch.bfloat16 if share < MAX_SHARE else None, reason)


def exact_layers(vae: nn.Module, unet: nn.Module) -> frozenset[nn.Module]:
    """Return the layers that are multiplied in the weights' own type in any case."""
    modules = (*vae.named_modules(), *unet.named_modules())
    return frozenset(module for name, module in modules if _EXACT.fullmatch(name))


@torch.no_grad()
def measured_share() -> float:
    """Return the time of a convolution in bfloat16 over that in float32, the best of some each."""
    shortest = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(1, _CHANNELS, _SIDE, _SIDE, dtype=dtype)
        weight = torch.ones(_CHANNELS, _CHANNELS, 3, 3, dtype=dtype)
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
        times = []
        for _ in range(_REPETITIONS):
            begin = time.perf_counter()
            F.conv2d(x, weight, padding=1)
            times.append(time.perf_counter() - begin)
        shortest[dtype] = min(times)
    return shortest[torch.bfloat16] / shortest[torch.float32]
