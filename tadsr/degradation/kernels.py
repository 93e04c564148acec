"""Blur kernels of the degradation, as pure functions of their parameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
