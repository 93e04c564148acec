"""The topology of encoder, UNet and decoder, once for all ways of running their layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import Attention
    from diffusers.models.downsampling import Downsample2D
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel
    from diffusers.models.upsampling import Upsample2D

    from tadsr.networks.time_aware_vae import TimeAwareAutoencoderKL, TimeAwareEncoder


class Layers(Protocol):
    """Runs single layers, at the timesteps and prompts that it was made for.

    What a layer returns is private to the implementation, and called h here. Latents and images are
    tensors, or what the implementation reads rows of and gives rows of.
    """

    def start(self, conv: nn.Conv2d, x: Any) -> Any:
        """Convolve a network's input."""

    def pointwise(self, conv: nn.Conv2d, x: Any) -> Any:
        """Convolve latents by a 1×1 kernel."""

    def resnet(self, block: ResnetBlock2D, h: Any) -> Any:
        """Run a ResNet block."""

    def attend(self, layer: Attention, h: Any) -> Any:
        """Run an autoencoder's attention with its normalisation and residual."""

    def transform(self, layer: Transformer2DModel, h: Any) -> Any:
        """Run a transformer over the positions of a map, with its residual."""

    def downsample(self, layer: Downsample2D, h: Any) -> Any:
        """Halve the sides."""

    def upsample(self, layer: Upsample2D, h: Any, size: tuple[int, int]) -> Any:
        """Double the sides to a size, which may be one less."""

    def size(self, h: Any) -> tuple[int, int]:
        """Return height and width."""

    def keep(self, h: Any) -> Any:
        """Keep h as it is until it is joined."""

    def join(self, h: Any, kept: Any) -> Any:
        """Put two side by side in their channels."""

    def end(self, norm: nn.GroupNorm | None, conv: nn.Conv2d, h: Any) -> Any:
        """Normalise, activate and convolve to a network's output."""


def encode(layers: Layers, vae: TimeAwareAutoencoderKL, lq: Any) -> Any:
    """Encode images (B, 3, H, W) in [-1, 1] to the posterior's moments (B, 2·C, H/f, W/f)."""
    return layers.pointwise(vae.quant_conv, encode_unmixed(layers, vae.encoder, lq))


def encode_unmixed(layers: Layers, encoder: TimeAwareEncoder, lq: Any) -> Any:
    """Encode images to the moments before `quant_conv`."""
    h = layers.start(encoder.conv_in, lq)
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            h = layers.resnet(resnet, h)
        for downsampler in block.downsamplers or ():
            h = layers.downsample(downsampler, h)
    h = _middle(layers, encoder.mid_block, h, layers.attend)
    return layers.end(encoder.conv_norm_out, encoder.conv_out, h)


def predict(layers: Layers, unet: UNet2DConditionModel, latents: Any) -> Any:
    """Predict the residual r of the student's one step from scaled latents (B, C, h, w).

    Args:
        latents: (B, C, h, w).
    """
    h = layers.start(unet.conv_in, latents)
    skips = [layers.keep(h)]
    for block in unet.down_blocks:
        for resnet, transformer in _pairs(block):
            h = layers.resnet(resnet, h)
            if transformer is not None:
                h = layers.transform(transformer, h)
            skips.append(layers.keep(h))
        for downsampler in block.downsamplers or ():
            h = layers.downsample(downsampler, h)
            skips.append(layers.keep(h))
    if unet.mid_block is not None:
        h = _middle(layers, unet.mid_block, h, layers.transform)
    for block in unet.up_blocks:
        for resnet, transformer in _pairs(block):
            h = layers.resnet(resnet, layers.join(h, skips.pop()))
            if transformer is not None:
                h = layers.transform(transformer, h)
        for upsampler in block.upsamplers or ():
            # Odd sizes were rounded up on the way down.
            h = layers.upsample(upsampler, h, layers.size(skips[-1]))
    return layers.end(unet.conv_norm_out, unet.conv_out, h)


def decode(layers: Layers, vae: TimeAwareAutoencoderKL, z: Any) -> Any:
    """Decode unscaled latents (B, C, h, w) to images (B, 3, f·h, f·w), not clamped.

    Args:
        z: (B, C, h, w).
    """
    decoder = vae.decoder
    h = layers.start(decoder.conv_in, layers.pointwise(vae.post_quant_conv, z))
    h = _middle(layers, decoder.mid_block, h, layers.attend)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            h = layers.resnet(resnet, h)
        for upsampler in block.upsamplers or ():
            height, width = layers.size(h)
            h = layers.upsample(upsampler, h, (2 * height, 2 * width))
    return layers.end(decoder.conv_norm_out, decoder.conv_out, h)


def _middle(
    layers: Layers, block: nn.Module, h: Any, attend: Callable[[nn.Module, Any], Any]
) -> Any:
    first, *further = block.resnets
    h = layers.resnet(first, h)
    for attention, resnet in zip(block.attentions, further, strict=True):
        if attention is not None:
            h = attend(attention, h)
        h = layers.resnet(resnet, h)
    return h


def _pairs(block: nn.Module) -> Iterator[tuple[ResnetBlock2D, Transformer2DModel | None]]:
    attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
    return zip(block.resnets, attentions, strict=True)
