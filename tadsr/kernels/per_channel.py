"""Values per channel that are the same for all samples, or one row per sample."""

from __future__ import annotations

from torch import Tensor


def check_per_channel(name: str, values: Tensor | None, batch: int, channels: int) -> None:
    """Check that values are (C,), (1, C) or (B, C).

    Raises:
        ValueError: They are not.
    """
    if values is None or values.shape in ((channels,), (1, channels), (batch, channels)):
        return
    raise ValueError(
        f"{name} must be ({channels},), (1, {channels}) or ({batch}, {channels}), "
        f"got {tuple(values.shape)}"
    )


def check_activations(name: str, x: Tensor) -> None:
    """Check that a tensor is float (B, C, H, W) with elements.

    Raises:
        TypeError: It is not a float tensor.
        ValueError: It has another number of dimensions, or a side of 0.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        found = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a floating-point tensor, not {found}")
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(
            f"{name} must have the shape (B, C, H, W), no side 0, got {tuple(x.shape)}"
        )


def over_positions(values: Tensor) -> Tensor:
    """Shape values per channel so that they broadcast over (B, C, H, W)."""
    return values if values.ndim == 4 else values.reshape(-1, values.shape[-1], 1, 1)
