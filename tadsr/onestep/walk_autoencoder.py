"""Encoder and decoder of the time-aware autoencoder, layer by layer."""

from __future__ import annotations

from torch import Tensor, nn

from tadsr.networks.time_aware_vae import TimeAwareAutoencoderKL
from tadsr.onestep.fused_layers import Activation, Layers, TimeConditions


def encode(layers: Layers, vae: TimeAwareAutoencoderKL, lq: Tensor, time: TimeConditions) -> Tensor:
    """Encode images.

    Args:
        layers: Runs the layers.
        vae: The autoencoder.
        lq: (B, 3, H, W), in [-1, 1]; H and W multiples of the factor.
        time: Of every ResNet block.

    Returns:
        The posterior's moments, (B, 2·latent_channels, H/f, W/f).
    """
    encoder = vae.encoder
    h = layers.convolve(encoder.conv_in, layers.laid_out(lq), settled=True)
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            h = layers.resnet(resnet, h, time)
        for downsampler in block.downsamplers or ():
            h = layers.downsample(downsampler, h.values)
    h = _mid_block(layers, encoder.mid_block, h, time)
    h = layers.normalize(encoder.conv_norm_out, h)
    h = layers.convolve(encoder.conv_out, h, settled=True)
    return layers.convolve(vae.quant_conv, h.values, settled=True).values


def decode(layers: Layers, vae: TimeAwareAutoencoderKL, z: Tensor) -> Tensor:
    """Decode unscaled latents (B, C, h, w) to images (B, 3, f·h, f·w), not clamped."""
    decoder = vae.decoder
    h = layers.convolve(vae.post_quant_conv, layers.laid_out(z), settled=True)
    h = layers.convolve(decoder.conv_in, h.values, settled=True)
    h = _mid_block(layers, decoder.mid_block, h, {})
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            h = layers.resnet(resnet, h, {})
        for upsampler in block.upsamplers or ():
            height, width = h.values.shape[2:]
            h = layers.upsample(upsampler, h.values, (2 * height, 2 * width))
    h = layers.normalize(decoder.conv_norm_out, h)
    return layers.convolve(decoder.conv_out, h, settled=True).values


def _mid_block(layers: Layers, block: nn.Module, h: Activation, time: TimeConditions) -> Activation:
    first, *further = block.resnets
    h = layers.resnet(first, h, time)
    for attention, resnet in zip(block.attentions, further, strict=True):
        if attention is not None:
            h = layers.attend_globally(attention, h)
        h = layers.resnet(resnet, h, time)
    return h
