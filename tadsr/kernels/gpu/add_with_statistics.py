"""Residual addition with the sum's statistics, in one pass over the memory."""

import torch
from torch import Tensor

from tadsr.kernels.gpu.launch import Launch, run_launches
from tadsr.kernels.gpu.statistics import plan_statistics


def add_with_statistics(
    x: Tensor, residual: Tensor, channel_bias: Tensor | None, num_groups: int
) -> tuple[Tensor, Tensor]:
    """Compute `tadsr.kernels.add_with_statistics`."""
    total, statistics, launches = plan_add_with_statistics(x, residual, channel_bias, num_groups)
    run_launches(launches, x.device)
    return total, statistics


def plan_add_with_statistics(
    x: Tensor, residual: Tensor, channel_bias: Tensor | None, num_groups: int
) -> tuple[Tensor, Tensor, list[Launch]]:
    """Return sum and statistics, still empty, and the launches that fill them."""
    x = x.contiguous(memory_format=torch.channels_last)
    residual = residual.contiguous(memory_format=torch.channels_last)
    total = torch.empty_like(x, memory_format=torch.channels_last)
    statistics, launches = plan_statistics(x, num_groups, channel_bias, residual, total)
    return total, statistics, launches
