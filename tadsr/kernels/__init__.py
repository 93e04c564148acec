"""Fused operations for GPUs, in Triton, each with a plain-torch reference that runs anywhere.

Images and activations are NCHW in shape and NHWC (`torch.channels_last`) in memory. Triton is
imported when a kernel first runs; without it, without a GPU or where gradients are recorded, the
references compute the same.
"""

from tadsr.kernels.backends import Backend
from tadsr.kernels.geglu import geglu
from tadsr.kernels.group_norm import add_with_statistics, group_norm_silu, row_moments
from tadsr.kernels.images import adain_color_fix_uint8, to_uint8_nhwc, wavelet_color_fix_uint8

__all__ = [
    "Backend",
    "adain_color_fix_uint8",
    "add_with_statistics",
    "geglu",
    "group_norm_silu",
    "row_moments",
    "to_uint8_nhwc",
    "wavelet_color_fix_uint8",
]
