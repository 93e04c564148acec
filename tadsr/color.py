"""Colour fixes: give a restored image the colours of the image it came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from tadsr.kernels import color


def adain_color_fix(image: Tensor, reference: Tensor, weights: Tensor | None = None) -> Tensor:
    """Give each channel of an image the mean and spread of the reference.

    Args:
        image: Restored image (B, 3, H, W), any float dtype and any range.
        reference: Image with the wanted colours, same shape and range as `image`.
        weights: What each pixel counts for in mean and spread, (B, 1, H, W), at least 0, such as
            its alpha; None for all alike.

    Returns:
        A tensor like `image`; computed in float32, not clamped.

    Raises:
        TypeError: If an argument is not a floating-point tensor.
        ValueError: If the shapes differ, are not (B, 3, H, W) or hold no pixel.
    """
    _check_pair(image, reference)
    return match_moments(image, _moments(image, weights), _moments(reference, weights))


def match_moments(
    image: Tensor, moments: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]
) -> Tensor:
    """Turn channels of known mean and spread into channels of the wanted ones.

    Args:
        image: Image, or a part of one, (B, 3, H, W), any float dtype.
        moments: Mean and unbiased variance of the whole image's channels, (B, 3) each.
        wanted: Those of the reference.

    Returns:
        A tensor like `image`; computed in float32, not clamped.
    """
    pairs = (tuple(m.float() for m in pair) for pair in (moments, wanted))
    return color.match_moments(image.float(), *pairs).to(image.dtype)


def wavelet_reach_px(levels: int = 5) -> int:
    """Return how far a pixel of `wavelet_color_fix` looks in each direction, in px."""
    return 2**levels - 1


def wavelet_color_fix(image: Tensor, reference: Tensor, levels: int = 5) -> Tensor:
    """Replace an image's lowest frequency band by that of the reference.

    The low band is what `levels` blurs leave, blur i being [1, 2, 1] / 4 in each direction with
    its taps 2^i px apart and replicated edges.

    Args:
        image: Restored image (B, 3, H, W), any float dtype and any range.
        reference: Image with the wanted colours, same shape and range as `image`.
        levels: Number of blurs, at least 1; each doubles the size of what counts as detail.

    Returns:
        A tensor like `image`; computed in float32, not clamped.

    Raises:
        TypeError: If an argument is not a floating-point tensor or `levels` is not an int.
        ValueError: If the shapes differ, are not (B, 3, H, W) or hold no pixel, or `levels` < 1.
    """
    _check_pair(image, reference)
    if isinstance(levels, bool) or not isinstance(levels, int):
        raise TypeError(f"levels must be an int, not {type(levels).__name__}")
    if levels < 1:
        raise ValueError(f"levels must be at least 1, got {levels}")
    return color.swap_low_band(image.float(), reference.float(), levels).to(image.dtype)


def no_color_fix(image: Tensor, reference: Tensor) -> Tensor:
    """Return the image as it is; the neutral colour fix.

    Args:
        image: Restored image (B, 3, H, W).
        reference: Not used.

    Returns:
        `image` itself.
    """
    return image


COLOR_FIXES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "adain": adain_color_fix,
    "wavelet": wavelet_color_fix,
    "none": no_color_fix,
}


def _check_pair(image: Tensor, reference: Tensor) -> None:
    for name, value in (("image", image), ("reference", reference)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            found = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a floating-point tensor, not {found}")
        if value.ndim != 4 or value.shape[1] != 3 or value.numel() == 0:
            raise ValueError(
                f"{name} must have the shape (B, 3, H, W), no side 0, got {tuple(value.shape)}"
            )
    if image.shape != reference.shape:
        raise ValueError(
            f"image and reference must have one shape, got {tuple(image.shape)} and "
            f"{tuple(reference.shape)}; resize the reference first"
        )


def _moments(x: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if weights is not None:
        count = weights.sum((-2, -1))  # [B, 1]
        mean = (x.float() * weights).sum((-2, -1)) / count.clamp(min=1)
        spread = ((x.float() - mean[..., None, None]).square() * weights).sum((-2, -1))
        return mean, spread / (count - 1).clamp(min=1)
    return color.moments(x.float())
