"""Layers in bands, as the networks' walk runs them: exact but for windows of self-attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from tadsr.onestep.activations import (
    Activation,
    JoinedActivation,
    StoredActivation,
)
from tadsr.onestep.banded_layers import Bands, Source
from tadsr.onestep.operations import (
    Windows,
    attend_in_windows,
    merge_heads,
    split_heads,
    to_map,
    to_tokens,
)

if TYPE_CHECKING:
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.attention_processor import Attention
    from diffusers.models.downsampling import Downsample2D
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel
    from diffusers.models.upsampling import Upsample2D

_FEED_FORWARD = 4
"""Rows of a feed-forward's inside over those around it, beside the copies that any layer needs."""


class BandedLayers:
    """Runs the layers of one network over whole images, band by band.

    Args:
        temb: Time embedding, (B, E); None for a network without time, and for a plan.
        embeds: Prompt embeddings, (B, L, D), for a UNet.
        attention_side: Side of the self-attention's windows in latents at the finest level, halved
            at each coarser one; 0 for no windows.
        emit: Receives bands of the network's output in order: the first row, and (B, C, rows, W).
            None where the output is stored.
    """

    def __init__(
        self,
        bands: Bands,
        temb: Tensor | None = None,
        embeds: Tensor | None = None,
        *,
        attention_side: int = 0,
        emit: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        self.bands = bands
        self.temb = temb
        self.prompt_embeds = embeds
        self.side = attention_side
        self.emit = emit
        self._level = 0

    def start(self, conv: nn.Conv2d, x: Activation) -> StoredActivation:
        """Convolve a network's input."""
        return self.pointwise(conv, x)

    def pointwise(self, conv: nn.Conv2d, x: Activation) -> StoredActivation:
        """Convolve without a normalisation."""
        return self.bands.convolve(Source(x), conv, consume=not x.is_kept)

    def resnet(self, block: ResnetBlock2D, x: Activation) -> StoredActivation:
        """Run a ResNet block."""
        return self.bands.resnet(block, x, self.temb, consume=not x.is_kept)

    def attend(self, layer: Attention, x: StoredActivation) -> StoredActivation:
        """Run an autoencoder's attention, in place."""
        return self.bands.attend_globally(layer, x)

    def downsample(self, layer: Downsample2D, x: Activation) -> StoredActivation:
        """Halve the sides by a convolution of stride 2."""
        self._level += 1
        # The autoencoder's way: zeros after the last row and column only.
        pad_end = layer.padding == 0
        return self.bands.convolve(Source(x), layer.conv, pad_end=pad_end, consume=not x.is_kept)

    def upsample(self, layer: Upsample2D, x: Activation, size: tuple[int, int]) -> StoredActivation:
        """Enlarge by two (nearest) to a size, then convolve."""
        self._level -= 1
        return self.bands.convolve(Source(x, enlarged=size), layer.conv, consume=not x.is_kept)

    def size(self, x: Activation) -> tuple[int, int]:
        """Return height and width."""
        return x.shape[2:]

    def keep(self, x: Activation) -> Activation:
        """Have the layers that read an activation leave its memory alone."""
        x.is_kept = True
        return x

    def join(self, x: Activation, kept: Activation) -> JoinedActivation:
        """Put two activations side by side; neither is read again."""
        kept.is_kept = False
        return JoinedActivation([x, kept])

    def end(
        self, norm: nn.GroupNorm | None, conv: nn.Conv2d, x: Activation
    ) -> StoredActivation | None:
        """Normalise, activate and convolve to the output; None where it is emitted."""
        source = Source(x) if norm is None else self.bands.normalized(norm, x)
        return self.bands.convolve(source, conv, emit=self.emit, consume=True)

    def transform(self, transformer: Transformer2DModel, x: StoredActivation) -> StoredActivation:
        """Run a transformer with its residual, in place."""
        bands = self.bands
        batch, channels, height, width = x.shape
        norm = bands.normalized(transformer.norm, x).norm
        inner = transformer.proj_in.weight.shape[0]
        tokens = bands.storage.allocate((batch, inner, height, width), x.dtype)
        row_bytes = batch * max(channels, inner) * width * x.dtype.itemsize
        row_work = batch * channels * width * inner
        tokens.begin(with_statistics=False)
        for start, stop in bands.split(height, row_bytes, row_work):
            rows = norm(x.view(start, stop), False)
            tokens.write(start, _project(transformer.proj_in, rows))
        for block in transformer.transformer_blocks:
            self._attend(block, tokens)
        x.begin(with_statistics=True)
        for start, stop in bands.split(height, row_bytes, row_work):
            rows = _project(transformer.proj_out, tokens.view(start, stop))
            x.write(start, rows.add_(x.view(start, stop)))
        tokens.free()
        return x

    def _attend(self, block: BasicTransformerBlock, tokens: StoredActivation) -> None:
        """Run self-attention, cross-attention and feed-forward, in place."""
        bands, attention = self.bands, block.attn1
        batch, channels, height, width = tokens.shape
        side = self.side // 2**self._level if self.side else max(height, width)
        rows, columns = Windows(height, side), Windows(width, side)
        # Queries, keys and values see the tokens before this block changes any of them.
        parts = [bands.storage.allocate(tokens.shape, tokens.dtype) for _ in range(3)]
        for part in parts:
            part.begin(with_statistics=False)
        row_bytes = batch * channels * width * tokens.dtype.itemsize
        row_work = batch * width * channels * channels
        for start, stop in bands.split(height, 3 * row_bytes, 3 * row_work):
            normed = block.norm1(to_tokens(tokens.view(start, stop)))
            for part, layer in zip(
                parts, (attention.to_q, attention.to_k, attention.to_v), strict=True
            ):
                part.write(start, to_map(layer(normed), stop - start))
        row_work = batch * width * channels * (2 * rows.side * columns.side + 14 * channels)
        if bands.is_plan:
            bands.report(height * row_work)
            prompt, results = None, ()
        else:
            queries, keys, values = parts
            prompt = None
            if block.attn2 is not None:
                sides = (block.attn2.to_k, block.attn2.to_v)
                prompt = [
                    split_heads(side(self.prompt_embeds), block.attn2.heads) for side in sides
                ]
            results = attend_in_windows(
                queries.view,
                lambda start, stop: (keys.view(start, stop), values.view(start, stop)),
                rows,
                columns,
                heads=attention.heads,
                scale=attention.scale,
            )
        for first, attended in results:
            # What a window serves can be many rows of a wide image.
            for start, stop in bands.split(attended.shape[2], _FEED_FORWARD * row_bytes, row_work):
                x = to_tokens(tokens.view(first + start, first + stop))
                x = attention.to_out[0](to_tokens(attended[:, :, start:stop])) + x
                if prompt is not None:
                    x = _attend_to_prompt(block.attn2, block.norm2(x), prompt) + x
                x = block.ff(block.norm3(x)) + x
                tokens.write(first + start, to_map(x, stop - start))
        for part in parts:
            part.free()


def _attend_to_prompt(layer: Attention, tokens: Tensor, prompt: Sequence[Tensor]) -> Tensor:
    query = split_heads(layer.to_q(tokens), layer.heads)
    attended = F.scaled_dot_product_attention(query, *prompt, scale=layer.scale)
    return layer.to_out[0](merge_heads(attended))


def _project(layer: nn.Module, rows: Tensor) -> Tensor:
    """Apply a linear layer or a 1×1 convolution to a map (B, C, rows, W)."""
    if isinstance(getattr(layer, "base_layer", layer), nn.Conv2d):
        return layer(rows)
    return to_map(layer(to_tokens(rows)), rows.shape[2])
