"""Residual addition with the sum's statistics, in one pass over the memory."""

import torch
from torch import Tensor

from tadsr.kernels.gpu.launch import Launch, choose_chunks
from tadsr.kernels.gpu.statistics import plan_merge, plan_moments


def plan_add_with_statistics(
    x: Tensor, residual: Tensor, channel_bias: Tensor | None, num_groups: int, num_chunks: int
) -> tuple[Tensor, Tensor, list[Launch]]:
    """Return sum and statistics, still empty, and the launches that fill them."""
    x = x.contiguous(memory_format=torch.channels_last)
    residual = residual.contiguous(memory_format=torch.channels_last)
    total = torch.empty_like(x, memory_format=torch.channels_last)
    chunks = num_chunks or choose_chunks(x)[0]
    moments, measure = plan_moments(x, chunks, channel_bias, residual, total)
    if num_chunks:
        return total, moments, [measure]
    statistics, merge = plan_merge(moments, num_groups, x.shape[2] * x.shape[3])
    return total, statistics, [measure, merge]
