"""Single operations of the networks, each in the way that is fastest on a device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tadsr.onestep.activations import widest_dtype
from tadsr.onestep.plan import FastestChoice

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


# Row k of the transposed kernel is a sum of the rows of the plain one. An output row at an even
# place sees its own input row twice, through rows 1 and 2, and the one above through row 0.
_ROWS = ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0))


def transposed_weight(weight: Tensor) -> Tensor:
    """Return the transposed convolution's weight.

    `conv_transpose2d(x, result, bias, stride=2, padding=1)` equals
    `conv2d(interpolate(x, scale_factor=2), weight, bias, padding=1)` everywhere, with 4 in place of
    9 products per output.
    """
    wide = widest_dtype(weight.device)
    rows = torch.tensor(_ROWS, dtype=wide, device=weight.device)
    folded = torch.einsum("ap,oipq,bq->ioab", rows, weight.detach().to(wide), rows)
    return folded.to(weight.dtype)


PIECE_BYTES = 2**19
"""Rows of positions that are read and written while they are in the second-level cache."""
ROW_CHANNELS = 256
"""Few channels are taken for this many, of neighbouring positions, which a loop runs along."""


def group_norm_silu_in_pieces(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    silu: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """Normalize groups of channels and activate.

    Args:
        x: (B, C, H, W), channels_last.
        weight: Factor per channel, (C,) or (B, C).
        bias: Offset per channel, (C,) or (B, C).
        out: Overwritten; shaped and laid out as `x`, which it may be. None for a new tensor.

    Source: Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm (1979).
    """
    batch, channels, height, width = x.shape
    neighbours = math.gcd(max(1, ROW_CHANNELS // channels), height * width)
    positions = x.permute(0, 2, 3, 1).view(batch, -1, neighbours * channels)
    out = torch.empty_like(x) if out is None else out
    targets = out.permute(0, 2, 3, 1).view_as(positions)
    weight, bias = (values.expand(batch, -1).double() for values in (weight, bias))
    rows = max(1, PIECE_BYTES // (positions.shape[2] * x.element_size()))
    for sample, target, gain, offset in zip(positions, targets, weight, bias, strict=True):
        pieces = sample.split(rows)
        mean, variance = _moments(pieces, channels)
        grouped = mean.view(num_groups, -1)
        group_mean = grouped.mean(dim=1, keepdim=True)
        spread = variance.view(num_groups, -1) + (grouped - group_mean).square()
        inverse = (spread.mean(dim=1, keepdim=True) + eps).rsqrt()
        factor = gain * inverse.expand_as(grouped).reshape(-1)
        offset = offset - group_mean.expand_as(grouped).reshape(-1) * factor
        wide = torch.promote_types(x.dtype, torch.float32)
        factor, offset = (v.to(wide).repeat(neighbours) for v in (factor, offset))
        for piece, written in zip(pieces, target.split(rows), strict=True):
            is_wide = piece.dtype == written.dtype == wide
            normed = torch.addcmul(offset, piece, factor, out=written if is_wide else None)
            if silu:
                F.silu(normed, inplace=True)
            if not is_wide:
                written.copy_(normed)
    return out


def _moments(pieces: tuple[Tensor, ...], channels: int) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each channel over pieces (n, k·C), float64."""
    moments = []
    for piece in pieces:
        wide = piece.float() if piece.element_size() < 4 else piece
        moments.append(torch.stack(torch.batch_norm_update_stats(wide, None, None, 0.0)))
    means, variances = torch.stack(moments, dim=1).double()  # [pieces, k·C] each
    share = torch.tensor([[len(piece)] for piece in pieces], dtype=torch.float64)
    share = (
        (share / share.sum() * (channels / means.shape[1])).expand_as(means).reshape(-1, channels)
    )
    means, variances = means.view(-1, channels), variances.view(-1, channels)
    mean = (share * means).sum(dim=0)
    return mean, (share * (variances + (means - mean).square())).sum(dim=0)


MAX_FUSED_HEAD = 256
"""Widest head that flash and cuDNN attention take."""
SCORE_BYTES = 2**28
"""Scores of wide heads that exist at once, in float32."""


@dataclass(frozen=True)
class Windows:
    """Windows along one side that overlap by at least half, and the positions that each serves.

    A position is served by the window that it is most central in, so it sees at least a quarter of
    a window in either direction, or up to the side's end.

    Args:
        length: Positions along the side.
        size: Positions of a window; a side that is no longer has a single one.
    """

    length: int
    size: int

    @property
    def side(self) -> int:
        """Positions of each window."""
        return min(self.size, self.length)

    @property
    def starts(self) -> list[int]:
        """First position of each window, evenly spread."""
        room = self.length - self.side
        count = -(-room // max(1, self.side // 2)) + 1
        return [round(i * room / max(1, count - 1)) for i in range(count)]

    @property
    def served(self) -> list[tuple[int, int]]:
        """First position and the one after the last that each window serves; all, in order."""
        middles = [(a + b + self.side) // 2 for a, b in pairwise(self.starts)]
        return list(pairwise([0, *middles, self.length]))


def to_tokens(x: Tensor) -> Tensor:
    """Return a map (B, C, H, W) as tokens (B, H·W, C), a view."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_map(tokens: Tensor, height: int) -> Tensor:
    """Return tokens (B, H·W, C) as a map (B, C, H, W), a view."""
    # By another order a batch of one has other strides, by which convolutions round differently.
    return tokens.unflatten(1, (height, -1)).permute(0, 3, 1, 2)


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """Return tokens (B, N, C) as (B, heads, N, C / heads), a view."""
    return tokens.unflatten(2, (heads, -1)).transpose(1, 2)


def merge_heads(attended: Tensor) -> Tensor:
    """Return what heads (B, heads, N, D) attended to as tokens (B, N, heads·D)."""
    return attended.transpose(1, 2).flatten(2)


def attend_in_windows(
    query: Callable[[int, int], Tensor],
    key_value: Callable[[int, int], tuple[Tensor, Tensor]],
    rows: Windows,
    columns: Windows,
    *,
    heads: int,
    scale: float,
) -> Iterator[tuple[int, Tensor]]:
    """Let every position attend to a window around it.

    Args:
        query: Returns queries of rows from start to stop, (B, C, rows, W).

    Yields:
        The first row and the result (B, C, rows, W) of bands that together are all rows.
    """

    def split(x: Tensor) -> Tensor:
        # Contiguous, or fused kernels would leave it to the plain.
        return split_heads(to_tokens(x), heads).contiguous()

    for top, (start, stop) in zip(rows.starts, rows.served, strict=True):
        queries = query(start, stop)
        keys, values = key_value(top, top + rows.side)
        out = torch.empty_like(queries)
        for left, (first, last) in zip(columns.starts, columns.served, strict=True):
            window = (..., slice(left, left + columns.side))
            attended = F.scaled_dot_product_attention(
                split(queries[..., first:last]),
                split(keys[window]),
                split(values[window]),
                scale=scale,
            )
            out[..., first:last] = to_map(merge_heads(attended), stop - start)
        yield start, out


def attend_to_blocks(
    query: Tensor, blocks: Iterable[tuple[Tensor, Tensor]], *, scale: float
) -> Tensor:
    """Let every query attend to all keys, of which only one block is there at once.

    Source: Milakov and Gimelshein, Online normalizer calculation for softmax (2018).
    """
    highest = query.new_full((*query.shape[:-1], 1), -torch.inf, dtype=torch.float32)
    total, out = torch.zeros_like(highest), 0.0
    for key, value in blocks:
        scores = multiply_widely(query, key.mT).mul_(scale)  # [..., N, M]
        before, highest = highest, torch.maximum(highest, scores.amax(-1, keepdim=True))
        weights = scores.sub_(highest).exp_()
        faded = (before - highest).exp_()
        total = total * faded + weights.sum(-1, keepdim=True)
        out = out * faded + multiply_widely(weights, value)
    return (out / total).to(query.dtype)


def attend_with_wide_heads(
    query: Tensor, key: Tensor, value: Tensor, scale: float, choice: FastestChoice
) -> Tensor:
    """Attend in the faster way that a GPU has for heads too wide for flash attention."""
    candidates: dict[str, Callable[[], Tensor]] = {
        "memory-efficient": lambda: _attend_memory_efficiently(query, key, value, scale),
        "in chunks": lambda: attend_in_chunks(query, key, value, scale),
    }
    if query.dtype == torch.float32:
        del candidates["memory-efficient"]
    return choice.run(("attention", query.shape), candidates)


def attend_in_chunks(
    query: Tensor, key: Tensor, value: Tensor, scale: float, score_bytes: int = SCORE_BYTES
) -> Tensor:
    """Attend with scores in float32 that exist for some of the queries at a time.

    Args:
        query: (B, heads, N, D).
        key: (B, heads, L, D).
        value: (B, heads, L, D).
        score_bytes: Of the scores that exist at a time.

    Returns:
        (B, heads, N, D).
    """
    batch, heads, length, _ = query.shape
    query, key, value = (x.flatten(0, 1) for x in (query, key, value))
    rows = max(1, score_bytes // (4 * batch * heads * key.shape[1]))
    out = torch.empty_like(query)
    for start in range(0, length, rows):
        scores = multiply_widely(query[:, start : start + rows], key.mT).mul_(scale)
        torch.bmm(scores.softmax(-1).to(value.dtype), value, out=out[:, start : start + rows])
    return out.unflatten(0, (batch, heads))


def multiply_widely(a: Tensor, b: Tensor) -> Tensor:
    """Multiply (..., N, K) by (..., K, M) to float32: half precision keeps no steps of scores."""
    if b.device.type == "cuda" and b.dtype != torch.float32 and _BMM_TO_FLOAT32:
        parts = (x.to(b.dtype).flatten(0, -3) for x in (a, b))
        return torch.bmm(*parts, out_dtype=torch.float32).unflatten(0, a.shape[:-2])
    return a.float() @ b.float()


_BMM_TO_FLOAT32 = "dtype" in torch.ops.aten.bmm.overloads()


def _attend_memory_efficiently(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True):
        return F.scaled_dot_product_attention(query, key, value, scale=scale)
