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
    """Build the kernel that parameters describe, (size, size), float32, sum 1."""
    shape = (params.size, params.sigma_x, params.sigma_y, params.theta)
    if params.kind == "sinc":
        kernel = sinc_kernel(params.size, params.cutoff)
    elif params.kind.startswith("generalized"):
        kernel = generalized_gaussian_kernel(*shape, params.beta)
    elif params.kind.startswith("plateau"):
        kernel = plateau_kernel(*shape, params.beta)
    else:
        kernel = gaussian_kernel(*shape)
    return kernel.float()


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


def _squared_radius(size: int, sigma_x: float, sigma_y: float, theta: float) -> Tensor:
    """Return xᵀΣ⁻¹x on a centred grid, (size, size), float64."""
    axis = torch.arange(size, dtype=torch.float64) - size // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    along = x * math.cos(theta) + y * math.sin(theta)
    across = -x * math.sin(theta) + y * math.cos(theta)
    return (along / sigma_x) ** 2 + (across / sigma_y) ** 2


def gaussian_kernel(size: int, sigma_x: float, sigma_y: float, theta: float = 0.0) -> Tensor:
    """Return a Gaussian kernel with its longer axis turned by `theta`.

    Args:
        size: Side in px, odd.
        sigma_x: Standard deviation along the turned x axis, px, above 0.
        sigma_y: Standard deviation along the turned y axis, px, above 0.
        theta: Angle in radians.

    Returns:
        (size, size), float64, sum 1.

    Source: Real-ESRGAN (arXiv 2107.10833), equation 2.
    """
    return _normalized(torch.exp(-0.5 * _squared_radius(size, sigma_x, sigma_y, theta)))


def generalized_gaussian_kernel(
    size: int, sigma_x: float, sigma_y: float, theta: float, beta: float
) -> Tensor:
    """Return exp(−½·rᵝ) over the squared radius r; `beta` 1 is the Gaussian.

    Arguments and result as `gaussian_kernel`; `beta` is above 0.

    Source: Real-ESRGAN (arXiv 2107.10833), section 3.1.
    """
    radius = _squared_radius(size, sigma_x, sigma_y, theta)
    return _normalized(torch.exp(-0.5 * radius**beta))


def plateau_kernel(size: int, sigma_x: float, sigma_y: float, theta: float, beta: float) -> Tensor:
    """Return 1 / (1 + rᵝ) over the squared radius r: flat in the middle.

    Arguments and result as `gaussian_kernel`; `beta` is above 0.

    Source: Real-ESRGAN (arXiv 2107.10833), section 3.1.
    """
    radius = _squared_radius(size, sigma_x, sigma_y, theta)
    return _normalized(1 / (1 + radius**beta))


def sinc_kernel(size: int, cutoff: float) -> Tensor:
    """Return a circular low-pass filter, which rings like over-sharpened photos.

    Args:
        size: Side in px, odd.
        cutoff: Cut-off frequency in radians per px, in (0, π].

    Returns:
        (size, size), float64, sum 1; some values are negative.

    Source: Real-ESRGAN (arXiv 2107.10833), equation 6.
    """
    axis = torch.arange(size, dtype=torch.float64) - size // 2
    radius = torch.sqrt(axis[:, None] ** 2 + axis[None, :] ** 2)
    kernel = cutoff * torch.special.bessel_j1(cutoff * radius) / (2 * math.pi * radius)
    kernel[size // 2, size // 2] = cutoff**2 / (4 * math.pi)  # the limit at radius 0
    return _normalized(kernel)


def _normalized(kernel: Tensor) -> Tensor:
    return kernel / kernel.sum()
