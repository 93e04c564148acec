"""GEGLU in one pass: each value is read once and written once."""

import triton
import triton.language as tl
from torch import Tensor

from tadsr.kernels.gpu.launch import SIZES, Launch, ceil_divide, choose_tile

BLOCK_ELEMENTS = 1024
"""Elements of a block: 8 for each thread of 4 warps, 16 bytes of half precision."""


@triton.jit(do_not_specialize=SIZES)
def geglu_kernel(
    x, y, rows, width, num_blocks, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):
    """Gate a block of rows."""
    row = (tl.program_id(0) // num_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (tl.program_id(0) % num_blocks) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    start = row.to(tl.int64)[:, None] * width
    at = x + 2 * start + column[None, :]
    hidden = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(at + width, mask=mask, other=0.0).to(tl.float32)
    value = hidden * (0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)))
    tl.store(y + start + column[None, :], value.to(y.dtype.element_ty), mask=mask)


def plan_geglu(x: Tensor) -> tuple[Tensor, list[Launch]]:
    """Return the output, still empty, and the launch that fills it."""
    x = x.contiguous()
    width = x.shape[-1] // 2
    rows = x.numel() // (2 * width)
    y = x.new_empty((*x.shape[:-1], width))
    block_rows, block_width = choose_tile(width, BLOCK_ELEMENTS)
    num_blocks = ceil_divide(width, block_width)
    arguments = {
        "x": x,
        "y": y,
        "rows": rows,
        "width": width,
        "num_blocks": num_blocks,
        "BLOCK_ROWS": block_rows,
        "BLOCK_WIDTH": block_width,
    }
    return y, [Launch(geglu_kernel, (ceil_divide(rows, block_rows) * num_blocks,), arguments)]
