"""Apply drawn degradations to images; deterministic and replayable."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tadsr.degradation.jpeg import compress_jpeg, compress_webp
from tadsr.degradation.sample import DegradationParams, KernelParams, NoiseParams, StageParams

LUMA_BT601 = (0.299, 0.587, 0.114)
FFT_FROM_PX = 11
"""Kernels of at least this side are applied by FFT: a depthwise 21 × 21 convolution of 512 × 512
takes a CPU core five times as long; below, the direct convolution is as fast."""


@torch.no_grad()
def apply_degradation(
    hq: Tensor, params: DegradationParams | Sequence[DegradationParams]
) -> Tensor:
    """Degrade sharp images to the low-quality ones that a restorer is trained on.

    The same parameters give the same images. Noise is drawn by seeded generators on the CPU and
    then moved, so that it does not depend on the device.

    Args:
        hq: (B, 3, H, W), in [-1, 1]; each side at least `scale` px.
        params: One degradation per image, or one for all.

    Returns:
        LQ images, (B, 3, H // scale, W // scale), in [-1, 1], rounded to 8-bit levels.

    Raises:
        ValueError: The shape is wrong, or the numbers of images and degradations differ, or the
            degradations have different scales.

    Source: Real-ESRGAN (arXiv 2107.10833), figure 2.
    """
    if hq.ndim != 4 or hq.shape[1] != 3:
        raise ValueError(f"hq must have the shape (B, 3, H, W), got {tuple(hq.shape)}")
    items = [params] * len(hq) if isinstance(params, DegradationParams) else list(params)
    if len(items) != len(hq) or len({item.scale for item in items}) > 1:
        raise ValueError(
            f"params must be one degradation or one per image ({len(hq)}) of one scale, "
            f"got {len(items)} of the scales {sorted({item.scale for item in items})}"
        )
    if items and min(hq.shape[-2:]) < items[0].scale:
        raise ValueError(
            f"hq must be at least scale ({items[0].scale}) px a side, got {tuple(hq.shape[-2:])}"
        )
    images = hq.float() / 2 + 0.5
    lq = [_apply_one(images[i : i + 1], item) for i, item in enumerate(items)]
    rounded = (torch.cat(lq).clamp(0, 1) * 255).round() / 255
    return (rounded * 2 - 1).to(hq.dtype)


def make_kernel(params: KernelParams) -> Tensor:
    """Build a blur kernel: of Gaussian shape, or a sinc, which rings like over-sharpened photos.

    Over the squared radius r = xᵀΣ⁻¹x a generalized Gaussian is exp(−½·rᵝ), with β = 1 the Gaussian
    itself, and a plateau 1 / (1 + rᵝ), flat in the middle. A sinc is a circular low-pass filter.

    Returns:
        (size, size), float32, sum 1; some values of a sinc are negative.

    Source: Real-ESRGAN (arXiv 2107.10833), equations 2 and 6, section 3.1.
    """
    centre = params.size // 2
    axis = torch.arange(params.size, dtype=torch.float64) - centre
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    if params.kind == "sinc":
        cutoff, radius = params.cutoff, torch.sqrt(y**2 + x**2)
        kernel = cutoff * torch.special.bessel_j1(cutoff * radius) / (2 * math.pi * radius)
        kernel[centre, centre] = cutoff**2 / (4 * math.pi)  # the limit at radius 0
    else:
        along = x * math.cos(params.theta) + y * math.sin(params.theta)
        across = -x * math.sin(params.theta) + y * math.cos(params.theta)
        squared = (along / params.sigma_x) ** 2 + (across / params.sigma_y) ** 2
        if params.kind.startswith("plateau"):
            kernel = 1 / (1 + squared**params.beta)
        else:
            is_plain = params.kind in ("iso", "aniso")
            kernel = torch.exp(-0.5 * squared ** (1 if is_plain else params.beta))
    return (kernel / kernel.sum()).float()


def _apply_one(image: Tensor, params: DegradationParams) -> Tensor:
    """Degrade one image (1, 3, H, W) in [0, 1]."""
    height, width = image.shape[-2:]
    lq_size = (height // params.scale, width // params.scale)
    if not params.stages:
        image = F.interpolate(image, lq_size, mode="bicubic", antialias=True).clamp(0, 1)
        return image if params.final_sinc is None else _blur(image, params.final_sinc)
    for order, stage in enumerate(params.stages):
        if stage.blur is not None:
            image = _blur(image, stage.blur)
        # The first order works at the HQ's size, a second one at the LQ's.
        base = (height, width) if order == 0 else lq_size
        size = tuple(max(1, int(side * stage.resize_factor)) for side in base)
        image = F.interpolate(image, size, mode=stage.resize_mode)
        image = _add_noise(image, stage.noise)
        if order < len(params.stages) - 1:
            image = _compress(image, stage)
    last = params.stages[-1]
    if params.jpeg_before_resize:
        image = _compress(image, last)
    image = F.interpolate(image, lq_size, mode=params.final_mode)
    if params.final_sinc is not None:
        image = _blur(image, params.final_sinc)
    if not params.jpeg_before_resize:
        image = _compress(image.clamp(0, 1), last)
    return image


def _compress(image: Tensor, stage: StageParams) -> Tensor:
    compress = compress_webp if stage.codec == "webp" else compress_jpeg
    return compress(image[0], stage.jpeg_quality)[None]


def _blur(image: Tensor, params: KernelParams) -> Tensor:
    kernel = make_kernel(params).to(image.device)
    half = params.size // 2
    # Reflection needs more pixels than it adds; tiny intermediate images repeat their edge.
    mode = "reflect" if min(image.shape[-2:]) > half else "replicate"
    padded = F.pad(image, (half, half, half, half), mode=mode)
    if params.size >= FFT_FROM_PX:
        return _correlate_fft(padded, kernel)
    return F.conv2d(padded, kernel.expand(3, 1, -1, -1), groups=3)


def _correlate_fft(padded: Tensor, kernel: Tensor) -> Tensor:
    """Return conv2d(padded, kernel) per channel, to float rounding."""
    height, width = padded.shape[-2:]
    size = (_fast_fft_length(height), _fast_fft_length(width))
    # conv2d correlates, the product of spectra convolves: turn the kernel by 180°.
    spectrum = torch.fft.rfft2(padded, size) * torch.fft.rfft2(kernel.flip(0, 1), size)
    # What wrapped around lies before this offset, what the FFT's own padding added behind.
    first = kernel.shape[-1] - 1
    return torch.fft.irfft2(spectrum, size)[..., first:height, first:width]


def _fast_fft_length(length: int) -> int:
    """Return the next even length whose only prime factors are 2, 3 and 5."""
    length += length % 2
    while 30 ** length.bit_length() % length:
        length += 2
    return length


def _add_noise(image: Tensor, params: NoiseParams) -> Tensor:
    generator = torch.Generator().manual_seed(params.seed)
    if params.kind == "gaussian":
        shape = (1, 1 if params.is_gray else 3, *image.shape[-2:])
        noise = torch.randn(shape, generator=generator) * (params.strength / 255)
    else:
        levels = (image.clamp(0, 1) * 255).round().cpu() / 255
        if params.is_gray:
            weights = torch.tensor(LUMA_BT601)[None, :, None, None]
            levels = ((levels * weights).sum(1, keepdim=True) * 255).round() / 255
        # A photon count per level: the more levels in use, the finer the noise.
        histogram = torch.bincount((levels * 255).round().byte().flatten())
        count = 2 ** math.ceil(math.log2(max(2, int(histogram.count_nonzero()))))
        noise = torch.poisson(levels * count, generator=generator) / count - levels
        noise = noise * params.strength
    return (image + noise.to(image.device)).clamp(0, 1)
