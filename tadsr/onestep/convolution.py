"""Convolutions and projections in the way that is fastest on a device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_CONVOLVED_TOKENS = 256
"""Fewer tokens than this are multiplied as a matrix also on a CPU: a convolution would take longer
to bring the weights into its order."""


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, ...] = (1, 1),
    padding: tuple[int, ...] = (0, 0),
) -> Tensor:
    """Convolve (B, C, H, W)."""
    if (
        weight.shape[2:] == (1, 1)
        and (x.device.type, x.dtype) == ("cpu", torch.float32)
        and torch.get_num_threads() == 1
        and torch.backends.mkldnn.is_available()
    ):
        # On one thread torch leaves 1×1 kernels to MKL, and writes the result in another layout.
        return torch.mkldnn_convolution(x, weight, bias, padding, stride, (1, 1), 1)
    return F.conv2d(x, weight, bias, stride, padding)


def project(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a linear layer, or a 1×1 convolution as one, to tokens (B, N, C)."""
    weight = weight.flatten(1)
    bias = None if bias is None else bias.to(weight.dtype)
    if tokens.device.type != "cpu" or tokens.shape[1] < MIN_CONVOLVED_TOKENS:
        return F.linear(tokens, weight, bias)
    # torch multiplies matrices by MKL, half as fast on AMD's processors as oneDNN's convolution.
    row = tokens.unsqueeze(1).permute(0, 3, 1, 2)  # [B, C, 1, N], channels_last in memory
    out = convolve(row, weight[:, :, None, None], bias)
    return out.permute(0, 2, 3, 1).squeeze(1)
