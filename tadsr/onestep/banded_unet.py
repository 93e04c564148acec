"""The UNet in bands: exact but for self-attention, which looks at a window."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from tadsr.onestep.activations import ComputedActivation, JoinedActivation, StoredActivation
from tadsr.onestep.attention import Windows, attend_in_windows
from tadsr.onestep.banded_layers import Bands, Source

_UNSUPPORTED = (
    "class_embed_type",
    "num_class_embeds",
    "addition_embed_type",
    "encoder_hid_dim_type",
    "time_cond_proj_dim",
    "time_embedding_act_fn",
)
_FEED_FORWARD = 4
"""Rows of a feed-forward's inside over those around it, beside the copies that any layer needs."""
_BLOCKS = {
    *("DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
    *("UNetMidBlock2DCrossAttn", None),
}


def check_unet(unet: UNet2DConditionModel) -> None:
    """Raise ValueError unless a UNet consists of Stable Diffusion's blocks."""
    config = unet.config
    named = [name for name in _UNSUPPORTED if config.get(name) is not None]
    blocks = {*config.down_block_types, *config.up_block_types, config.mid_block_type}
    if named or config.center_input_sample or blocks - _BLOCKS:
        found = sorted(map(str, blocks - _BLOCKS)) + named
        raise ValueError(
            "a UNet that is computed in bands must consist of Stable Diffusion's blocks without "
            f"further conditioning, got {', '.join(found) or 'center_input_sample'}; call the "
            "pipeline with tiling=None"
        )


def predict_in_bands(
    bands: Bands,
    unet: UNet2DConditionModel,
    latents: Tensor,
    timesteps: Tensor,
    prompt_embeds: Tensor,
    *,
    attention_side: int,
) -> Tensor:
    """Run the UNet.

    Args:
        bands: Runs the layers.
        unet: The student; see `check_unet`.
        latents: Scaled latents, (B, C, h, w).
        timesteps: (B,), int64.
        prompt_embeds: (B, L, D).
        attention_side: Side of the self-attention's windows in latents at the finest level, halved
            at each coarser one; 0 for no windows.

    Returns:
        The UNet's output, (B, C_out, h, w).
    """
    batch, _, height, width = latents.shape
    if bands.is_plan:
        temb = None
    else:
        sample = prompt_embeds.new_empty(batch)
        temb = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timesteps))
    run = _Run(bands, temb, prompt_embeds, attention_side)
    rows = ComputedActivation(
        tuple(latents.shape), latents.dtype, lambda a, b: latents[:, :, a:b].clone()
    )
    h = bands.convolve(Source(rows), unet.conv_in)
    skips = [h]
    for level, block in enumerate(unet.down_blocks):
        for resnet, transformer in run.layers(block):
            h = bands.resnet(resnet, h, temb)
            if transformer is not None:
                h = run.transform(transformer, h, level)
            skips.append(h)
        for downsampler in block.downsamplers or ():
            h = bands.convolve(Source(h), downsampler.conv)
            skips.append(h)
    level = len(unet.down_blocks) - 1
    if unet.mid_block is not None:
        first, *further = unet.mid_block.resnets
        # The last of the skips must stay as it is.
        h = bands.resnet(first, h, temb)
        for transformer, resnet in zip(unet.mid_block.attentions, further, strict=True):
            h = run.transform(transformer, h, level)
            h = bands.resnet(resnet, h, temb, consume=True)
    for block in unet.up_blocks:
        for resnet, transformer in run.layers(block):
            skip = skips.pop()
            h = bands.resnet(resnet, JoinedActivation([h, skip]), temb, consume=True)
            if transformer is not None:
                h = run.transform(transformer, h, level)
        for upsampler in block.upsamplers or ():
            # Odd sizes were rounded up on the way down.
            source = Source(h, enlarged=skips[-1].shape[2:])
            h = bands.convolve(source, upsampler.conv, consume=True)
            level -= 1
    out = torch.empty(
        (batch, unet.config.out_channels, height, width), dtype=latents.dtype, device=latents.device
    )

    def emit(start: int, rows: Tensor) -> None:
        out[:, :, start : start + rows.shape[2]] = rows

    norm = unet.conv_norm_out
    source = Source(h) if norm is None else bands.normalized(norm, h)
    bands.convolve(source, unet.conv_out, emit=emit, consume=True)
    return out


class _Run:
    """What the blocks of one pass share."""

    def __init__(self, bands: Bands, temb: Tensor, prompt_embeds: Tensor, side: int) -> None:
        self.bands = bands
        self.temb = temb
        self.prompt_embeds = prompt_embeds
        self.side = side

    @staticmethod
    def layers(block: nn.Module) -> Iterator[tuple[nn.Module, Transformer2DModel | None]]:
        attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
        return zip(block.resnets, attentions, strict=True)

    def transform(
        self, transformer: Transformer2DModel, x: StoredActivation, level: int
    ) -> StoredActivation:
        """Run a transformer with its residual, in place."""
        bands = self.bands
        batch, channels, height, width = x.shape
        affine = bands.affine(transformer.norm, x)
        inner = transformer.proj_in.weight.shape[0]
        tokens = bands.storage.allocate((batch, inner, height, width), x.dtype)
        row_bytes = batch * max(channels, inner) * width * x.dtype.itemsize
        row_work = batch * channels * width * inner
        tokens.begin(with_statistics=False)
        for start, stop in bands.split(height, row_bytes, row_work):
            rows = x.read(start, stop)
            rows = torch.addcmul(affine[1], rows.float(), affine[0]).to(rows.dtype)
            tokens.write(start, _project(transformer.proj_in, rows))
        for block in transformer.transformer_blocks:
            self._attend(block, tokens, level)
        x.begin(with_statistics=True)
        for start, stop in bands.split(height, row_bytes, row_work):
            rows = x.read(start, stop)
            rows += _project(transformer.proj_out, tokens.read(start, stop))
            x.write(start, rows)
        tokens.free()
        return x

    def _attend(self, block: BasicTransformerBlock, tokens: StoredActivation, level: int) -> None:
        """Run self-attention, cross-attention and feed-forward, in place."""
        bands, attention = self.bands, block.attn1
        batch, channels, height, width = tokens.shape
        side = self.side // 2**level if self.side else max(height, width)
        rows, columns = Windows(height, side), Windows(width, side)
        # Queries, keys and values see the tokens before this block changes any of them.
        parts = [bands.storage.allocate(tokens.shape, tokens.dtype) for _ in range(3)]
        for part in parts:
            part.begin(with_statistics=False)
        row_bytes = batch * channels * width * tokens.dtype.itemsize
        row_work = batch * width * channels * channels
        for start, stop in bands.split(height, 3 * row_bytes, 3 * row_work):
            normed = block.norm1(_to_tokens(tokens.read(start, stop)))
            for part, layer in zip(
                parts, (attention.to_q, attention.to_k, attention.to_v), strict=True
            ):
                part.write(start, _to_map(layer(normed), stop - start))
        row_work = batch * width * channels * (2 * rows.side * columns.side + 14 * channels)
        if bands.is_plan:
            bands.report(height * row_work)
            results = ()
        else:
            queries, keys, values = parts
            results = attend_in_windows(
                queries.read,
                lambda start, stop: (keys.read(start, stop), values.read(start, stop)),
                rows,
                columns,
                heads=attention.heads,
                scale=attention.scale,
            )
        for first, attended in results:
            # What a window serves can be many rows of a wide image.
            for start, stop in bands.split(attended.shape[2], _FEED_FORWARD * row_bytes, row_work):
                x = _to_tokens(tokens.read(first + start, first + stop))
                x = attention.to_out[0](_to_tokens(attended[:, :, start:stop])) + x
                if block.attn2 is not None:
                    x = block.attn2(block.norm2(x), encoder_hidden_states=self.prompt_embeds) + x
                x = block.ff(block.norm3(x)) + x
                tokens.write(first + start, _to_map(x, stop - start))
        for part in parts:
            part.free()


def _project(layer: nn.Module, rows: Tensor) -> Tensor:
    """Apply a linear layer or a 1×1 convolution to a map (B, C, rows, W)."""
    if isinstance(getattr(layer, "base_layer", layer), nn.Conv2d):
        return layer(rows)
    return _to_map(layer(_to_tokens(rows)), rows.shape[2])


def _to_tokens(rows: Tensor) -> Tensor:
    return rows.flatten(2).transpose(1, 2)  # [B, rows·W, C]


def _to_map(tokens: Tensor, num_rows: int) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, (num_rows, -1))  # [B, C, rows, W]
