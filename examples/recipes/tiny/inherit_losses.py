"""What `inherit.py` asks of pictures beside distances: few errors of pixels, and no pattern."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tadsr.measure.spectrum import (
    UNSEEN_POWER,
    WINDOW_PX,
    log_spectrum,
    peaks_above,
    window_powers,
)
from tadsr.training.losses import blur_with, blurred_mse, chroma_mse, mse_per_sample
from tadsr.training.stages.stage_config import TimestepRamp

FAITHFUL = {
    "mse": (TimestepRamp(60.0, 0.0, 0.5), mse_per_sample),
    "chroma": (TimestepRamp(5.0, 3.0), chroma_mse),
}
"""Errors of pixels by timestep, beside the method's blurred one at weight 1."""
DAMPING, DAMPED_BELOW = 0.5, 100
"""Weight, as a part of the squared error's, of the squared distance from the enlarged LQ image at
timestep 0, and the timestep where it is gone. Without it the faithful end overshot on photographs
that are better than those it is trained on."""
IMITATION = TimestepRamp(0.0, 8.0)
"""Weight of what the imitate stage asks; by the distance from the originals alone, surfaces without
detail were filled with a weave."""
WAVES = 0.1
"""Weight of `wave_error`."""
BLOCKINESS = 0.8
"""Weight of the squared difference of `block_pattern` from the original's."""
DETAIL = TimestepRamp(0.0, 5.0, 1.5)
"""Weight of `detail_error`. Growing faster at small timesteps it took 0.1 dB from the faithful
end."""
_DETAIL_PX = 32
"""Side of the windows in which detail is compared."""
_BANDS = ((2, 4), (4, 6), (6, 8), (8, 11), (11, 16), (16, 23))
"""Waves in a window, from and below which number, whose energies are compared together."""
_UNSEEN_DETAIL = 1e-5
"""Power of a wave, of images in [-1, 1], below which surfaces count as smooth."""
_JPEG_BLOCK_PX = 32
"""Of a block of 8 px after enlarging."""
BLOCK_PATTERN = (2, _JPEG_BLOCK_PX // 2 - 1)
"""Shape of an image's `block_pattern`: rows and columns, and the frequencies between a block's own
and the highest."""
_FINE_PX, _PLACE_PX = 1.0, 6.0
"""Standard deviations of what fine structure lies beside, and of the place that it is compared
in."""
_WEAKEST = 0.5
"""What fine structure is multiplied by at the least."""
_NO_STRUCTURE = 1e-5
"""Power of fine structure, of images in [-1, 1], below which surfaces count as smooth."""
_GRID_PX = 4
GRID_FREQUENCY = _JPEG_BLOCK_PX // _GRID_PX - 1
"""Which of a `block_pattern`'s frequencies the latents' grid has as well."""
_BLOCKS = 15
"""Blocks of the grid along a window's side."""


def faithful_error(image: Tensor, hq: Tensor, lq: Tensor, timesteps: Tensor) -> Tensor:
    """Return how far images (B, 3, H, W) are from the originals by pixels, (B,).

    At the faithful end the enlarged LQ images hold them back as well.
    """
    error = blurred_mse(image, hq, timesteps)
    for ramp, error_of in FAITHFUL.values():
        error = error + ramp.at(timesteps) * error_of(image, hq)
    damping = DAMPING * (1 - timesteps / DAMPED_BELOW).clamp(min=0)
    return error + damping * FAITHFUL["mse"][0].at(timesteps) * mse_per_sample(image, lq)


def imitation_weight(timesteps: Tensor, is_closer: Tensor) -> Tensor:
    """Return how much pictures are to be like the restorer's: not where that knows no better.

    Args:
        timesteps: (B,).
        is_closer: Whether the restorer's picture is closer to the original, (B,).

    Returns:
        (B,), 0 where the restorer is no closer.
    """
    return IMITATION.at(timesteps) * is_closer


def grid_pattern(images: Tensor) -> Tensor:
    """Return how much of the detail repeats with the latents' grid.

    Args:
        images: (B, 3, H, W), each side at least 63 px.

    Returns:
        (B,), the mean over windows of the logarithm of the power of the mean block over what chance
        would leave of it; near 0 for photographs.
    """
    light = images.float().mean(1, keepdim=True)
    inside = slice(_GRID_PX // 2, 1 - _GRID_PX // 2)
    detail = (light[..., inside, inside] - F.avg_pool2d(light, _GRID_PX, 1))[:, 0]
    side = _BLOCKS * _GRID_PX
    rows, columns = (length // side for length in detail.shape[-2:])
    detail = detail[:, : rows * side, : columns * side]
    blocks = detail.view(-1, rows, _BLOCKS, _GRID_PX, columns, _BLOCKS, _GRID_PX)
    mean = blocks.mean((2, 5)).square().mean((2, 4))
    power = blocks.square().mean((2, 3, 5, 6))
    return (_BLOCKS**2 * mean / (power + 1e-6) + 1e-3).log().mean((1, 2))


def block_pattern(images: Tensor) -> Tensor:
    """Return how far frequencies at which JPEG's blocks repeat stand out of those between them.

    Args:
        images: (B, 3, H, W), made of LQ images whose first block begins at the corner.

    Returns:
        (B, 2, 15), logarithms of powers' ratios along rows and columns, for each frequency.
    """
    light = images.float().mean(1)
    ratios = []
    for lines in (light, light.mT):
        count = lines.shape[-1] // _JPEG_BLOCK_PX
        length = count * _JPEG_BLOCK_PX
        lines = lines[..., :length] - lines[..., :length].mean(-1, keepdim=True)
        fade = torch.hann_window(length, device=images.device)
        waves = torch.view_as_real(torch.fft.rfft(lines * fade, norm="ortho"))
        power = (waves.square().sum(-1).mean(1) + UNSEEN_POWER).log()
        between = power[:, count // 2 :: count]
        ratios.append(power[:, count:-1:count] - (between[:, :-1] + between[:, 1:]) / 2)
    return torch.stack(ratios, 1)


def detail_error(images: Tensor, hq: Tensor, restored: Tensor) -> Tensor:
    """Return how far the energy of each band of waves is from what it should be, (B,).

    That of the restorer's pictures, wherever in a window the waves lie; or less, by as much as
    these pictures have more of a band than the originals on the whole.

    Args:
        images: (B, 3, H, W), each side at least 32 px.
        hq: Originals, of the same shape.
        restored: The restorer's pictures, of the same shape.
    """
    frequencies = torch.fft.fftfreq(_DETAIL_PX, 1 / _DETAIL_PX, device=images.device)
    radius = torch.hypot(frequencies[:, None], frequencies).flatten()
    bands = torch.stack([(radius >= low) & (radius < high) for low, high in _BANDS], 1).float()
    found, original, wanted = (
        (
            window_powers(pictures, _DETAIL_PX).flatten(3) @ (bands / bands.sum(0)) + _UNSEEN_DETAIL
        ).log()
        for pictures in (images, hq, restored)
    )
    excess = (wanted - original).mean((1, 2), keepdim=True).relu()
    return (found - wanted + excess).square().mean((1, 2, 3))


def fitted(images: Tensor, hq: Tensor, strongest: Tensor) -> Tensor:
    """Return images with as much fine structure at each place as the originals have there.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        hq: Originals, of the same shape.
        strongest: What fine structure is multiplied by at the most, (B,), at least 1.

    Returns:
        Of the same shape, in [-1, 1]: edges and textures stronger, noise on smooth surfaces weaker.
    """
    fine, wanted = (pictures - _blurred(pictures, _FINE_PX) for pictures in (images, hq))
    powers = (
        _blurred(structure.square().mean(1, keepdim=True), _PLACE_PX) + _NO_STRUCTURE
        for structure in (wanted, fine)
    )
    gain = torch.div(*powers).sqrt().clamp(min=_WEAKEST)
    gain = gain.minimum(strongest.view(-1, 1, 1, 1))
    return (images + (gain - 1) * fine).clamp(-1, 1)


def _blurred(images: Tensor, sigma_px: float) -> Tensor:
    half = math.ceil(3 * sigma_px)
    offsets = torch.arange(-half, half + 1, device=images.device)
    kernel = torch.exp(-0.5 * (offsets / sigma_px) ** 2)
    return blur_with(images, (kernel / kernel.sum()).expand(len(images), -1))


def wave_error(images: Tensor, originals: Tensor) -> Tensor:
    """Return how much stands out of the spectrum of all images together, a number of at least 0.

    Args:
        images: (B, 3, H, W), each side at least 64 px.
        originals: Of the same shape.
    """
    above = peaks_above(log_spectrum(images), log_spectrum(originals)).relu()
    return above.square().sum() / WINDOW_PX
