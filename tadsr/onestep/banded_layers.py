"""Layers over a whole image, computed band by band with the result of the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from tadsr.caches import is_kind
from tadsr.onestep.activations import Activation, StoredActivation
from tadsr.onestep.operations import (
    MAX_FUSED_HEAD,
    SCORE_BYTES,
    attend_in_chunks,
    attend_to_blocks,
    merge_heads,
    split_heads,
    to_map,
    to_tokens,
)
from tadsr.onestep.storage import BandStorage, PlannedStorage
from tadsr.onestep.support import weights_in_place

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D

Norm = Callable[[Tensor, bool], Tensor]
"""A normalisation of rows, and whether SiLU follows."""

_WORKING_COPIES = 3
"""Copies of a band that are alive at once in a layer: input, activated input, output."""
_KEYS_AT_ONCE = 512
"""About how many positions are attended to at once where not all keys lie on the device."""


@dataclass(frozen=True)
class Source:
    """What a layer reads: an activation, normalised, activated or enlarged on the way.

    Args:
        activation: Where rows come from.
        norm: Normalisation, followed by SiLU; None for neither.
        enlarged: (H, W) after nearest enlargement by two; None for none.
    """

    activation: Activation
    norm: Norm | None = None
    enlarged: tuple[int, int] | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, C, H, W) as the layer sees it."""
        return (*self.activation.shape[:2], *(self.enlarged or self.activation.shape[2:]))

    def read(self, start: int, stop: int) -> Tensor:
        """Return rows (B, C, stop − start, W), not to be changed."""
        if self.enlarged is not None:
            return self._read_enlarged(start, stop)
        rows = self.activation.view(start, stop)
        return rows if self.norm is None else self.norm(rows, True)

    def _read_enlarged(self, start: int, stop: int) -> Tensor:
        first = start // 2
        rows = self.activation.view(first, (stop - 1) // 2 + 1)
        rows = F.interpolate(rows, scale_factor=2.0, mode="nearest")
        return rows[:, :, start - 2 * first : stop - 2 * first, : self.enlarged[1]]

    def give_up(self, stop: int) -> None:
        """Give the memory of the rows before `stop` back."""
        self.activation.give_up(stop if self.enlarged is None else stop // 2)


class Bands:
    """Runs layers over activations in bands of rows.

    With a `PlannedStorage` the layers compute nothing, and report their work at once.
    """

    def __init__(
        self,
        storage: BandStorage,
        band_bytes: int,
        tick: Callable[[int], None] | None = None,
    ) -> None:
        self.storage = storage
        self.band_bytes = band_bytes
        self._tick = tick

    def split(self, height: int, row_bytes: int, row_work: int) -> Iterator[tuple[int, int]]:
        """Yield start and stop of bands, and report each when it is done."""
        if self.is_plan:
            self.report(height * row_work)
            return
        rows = max(1, self.band_bytes // (_WORKING_COPIES * row_bytes))
        # Of equal size: a last band of one row would cost nearly as much as a whole one.
        rows = -(-height // -(-height // rows))
        for start in range(0, height, rows):
            stop = min(start + rows, height)
            yield start, stop
            self.report((stop - start) * row_work)

    @property
    def is_plan(self) -> bool:
        """Whether nothing is computed and only work and memory are counted."""
        return isinstance(self.storage, PlannedStorage)

    def normalized(
        self,
        norm: nn.GroupNorm,
        x: Activation,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Source:
        """Return an activation as a layer reads it behind a GroupNorm and SiLU."""
        # A plan looks at no weights.
        return Source(x, None if self.is_plan else x.statistics.norm(norm, scale, shift))

    def report(self, multiplications: int) -> None:
        """Report work done."""
        if self._tick is not None:
            self._tick(multiplications)

    def convolve(
        self,
        source: Source,
        conv: nn.Conv2d,
        *,
        pad_end: bool = False,
        bias: Tensor | None = None,
        residual: Source | None = None,
        shortcut: tuple[nn.Conv2d, StoredActivation] | None = None,
        target: StoredActivation | None = None,
        emit: Callable[[int, Tensor], None] | None = None,
        consume: bool = False,
    ) -> StoredActivation | None:
        """Run a convolution with what surrounds it.

        Args:
            bias: Added per image and channel, (B, C_out).
        """
        batch, in_channels, height, width = source.shape
        base = getattr(conv, "base_layer", conv)
        weight = offset = None
        if not self.is_plan:
            with weights_in_place(base):
                weight, offset = _merged_weight(conv), base.bias
            if bias is not None and batch == 1:
                offset, bias = bias[0] if offset is None else offset + bias[0], None
        conv = base
        kernel, stride = conv.kernel_size[0], conv.stride[0]
        before, after = (0, 1) if pad_end else (conv.padding[0], conv.padding[0])
        out_height = (height + before + after - kernel) // stride + 1
        out_width = (width + before + after - kernel) // stride + 1
        out_channels = conv.out_channels
        dtype = source.activation.dtype
        if emit is None:
            if target is None:
                shape = (batch, out_channels, out_height, out_width)
                target = self.storage.allocate(shape, dtype)
            target.begin(with_statistics=True)
        widest = max(stride * stride * in_channels, out_channels)
        row_bytes = batch * widest * out_width * dtype.itemsize
        row_work = batch * out_channels * out_width * in_channels * kernel * kernel
        for start, stop in self.split(out_height, row_bytes, row_work):
            first, last = start * stride - before, (stop - 1) * stride - before + kernel
            rows = source.read(max(first, 0), min(last, height))
            outside = (max(-first, 0), max(last - height, 0))
            if any(outside) or pad_end:
                rows = F.pad(rows, (0, after if pad_end else 0, *outside))
            padding = (0, 0 if pad_end else before)
            out = F.conv2d(rows, weight, offset, conv.stride, padding)
            del rows
            if bias is not None:
                out += bias[:, :, None, None]
            if residual is not None:
                out += residual.read(start, stop)
            if shortcut is not None:
                shortcut[1].write(start, shortcut[0](source.activation.view(start, stop)))
            if consume:
                source.give_up(max(0, stop * stride - before))
            if emit is None:
                target.write(start, out)
            else:
                emit(start, out)
        if consume:
            source.activation.free()
        return target if emit is None else None

    def resnet(
        self, block: ResnetBlock2D, x: Activation, temb: Tensor | None, *, consume: bool = False
    ) -> StoredActivation:
        """Run a ResNet block.

        Args:
            block: With time added to the first convolution ("default"), as scale and shift of the
                second normalisation ("scale_shift"), or without.
            temb: Time embedding, (B, E).
        """
        bias = scale = shift = None
        if block.time_emb_proj is not None and temb is not None and not self.is_plan:
            time = block.time_emb_proj(block.nonlinearity(temb))
            if block.time_embedding_norm == "scale_shift":
                scale, shift = time.chunk(2, dim=1)
            else:
                bias = time
        target, shortcut = None, None
        if block.conv_shortcut is not None:
            # In the same pass, so that a large input need not stay until the second convolution.
            target = self.storage.allocate((x.shape[0], block.out_channels, *x.shape[2:]), x.dtype)
            target.begin(with_statistics=False)
            shortcut = (block.conv_shortcut, target)
        elif consume and isinstance(x, StoredActivation):
            target = x
        hidden = self.convolve(
            self.normalized(block.norm1, x),
            block.conv1,
            bias=bias,
            shortcut=shortcut,
            consume=consume and shortcut is not None,
        )
        out = self.convolve(
            self.normalized(block.norm2, hidden, scale, shift),
            block.conv2,
            residual=Source(x if shortcut is None else target),
            target=target,
            consume=True,
        )
        if consume and out is not x:
            x.free()
        return out

    def attend_globally(self, attention: Attention, x: StoredActivation) -> StoredActivation:
        """Run an autoencoder's attention with its normalisation and residual, in place."""
        batch, channels, height, width = x.shape
        norm = self.normalized(attention.group_norm, x).norm
        shape = (batch, attention.inner_kv_dim, height, width)
        keys, values = (self.storage.allocate(shape, x.dtype, in_one_piece=True) for _ in range(2))
        keys.begin(with_statistics=False)
        values.begin(with_statistics=False)

        def normalized(start: int, stop: int) -> Tensor:
            return to_tokens(norm(x.view(start, stop), False))

        row_bytes = batch * channels * width * x.dtype.itemsize
        row_work = batch * width * channels * channels
        for start, stop in self.split(height, row_bytes, 2 * row_work):
            tokens = normalized(start, stop)
            for part, layer in ((keys, attention.to_k), (values, attention.to_v)):
                part.write(start, to_map(layer(tokens), stop - start))

        whole = [part.in_place(0, height) for part in (keys, values)]
        is_whole = all(found is not None for found in whole)
        # Fused kernels take no heads as wide as these, and torch would keep all scores at once.
        is_wide = channels > attention.heads * MAX_FUSED_HEAD
        in_chunks = is_whole and is_wide and self.storage.device.type != "cpu"
        key_rows = height if is_whole else max(1, _KEYS_AT_ONCE // width)

        def heads_of(*maps: Tensor) -> list[Tensor]:
            return [split_heads(to_tokens(m), attention.heads) for m in maps]

        def attend(query: Tensor) -> Tensor:
            if in_chunks:
                most = min(SCORE_BYTES, self.band_bytes)
                return attend_in_chunks(query, *heads_of(*whole), attention.scale, most)
            if is_whole:
                return F.scaled_dot_product_attention(
                    query, *heads_of(*whole), scale=attention.scale
                )
            spans = ((a, min(a + key_rows, height)) for a in range(0, height, key_rows))
            blocks = (heads_of(keys.read(*span), values.read(*span)) for span in spans)
            return attend_to_blocks(query, blocks, scale=attention.scale)

        x.begin(with_statistics=True)
        # Scores of a band may exist as a whole, where no fused attention takes these widths.
        score_bytes = batch * attention.heads * width * key_rows * width * 4
        if in_chunks:
            score_bytes = 0
        row_work = 2 * batch * width * channels * (channels + height * width)
        for start, stop in self.split(height, max(row_bytes, score_bytes), row_work):
            out = attend(split_heads(attention.to_q(normalized(start, stop)), attention.heads))
            out = to_map(attention.to_out[0](merge_heads(out)), stop - start)
            kept = x.view(start, stop)
            out = out / attention.rescale_output_factor
            if attention.residual_connection:
                out += kept / attention.rescale_output_factor
            x.write(start, out)
        keys.free()
        values.free()
        return x


def _merged_weight(conv: nn.Module) -> Tensor:
    """Return a convolution's kernel, with the adapters that PEFT keeps beside it."""
    weight = conv.weight
    if is_kind(conv, "LoraLayer") and not (conv.merged or conv.disable_adapters):
        for name in conv.active_adapters:
            if name in conv.lora_A:
                weight = weight + conv.get_delta_weight(name)
    return weight
