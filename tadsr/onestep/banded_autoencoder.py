"""Encoder and decoder in bands, equal to the whole."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from tadsr.networks.time_aware_vae import TimeAwareAutoencoderKL
from tadsr.onestep.activations import Activation, ComputedActivation, StoredActivation
from tadsr.onestep.banded_layers import Bands, Source


def encode_in_bands(
    bands: Bands, vae: TimeAwareAutoencoderKL, image: Activation, timesteps: Tensor
) -> Tensor | None:
    """Run an autoencoder's encoder.

    Args:
        bands: Runs the layers.
        vae: The autoencoder.
        image: (B, 3, H, W), in [-1, 1]; H and W multiples of the factor.
        timesteps: One per image, (B,).

    Returns:
        The posterior's moments, (B, 2·latent_channels, H/f, W/f); None of a plan.
    """
    encoder = vae.encoder
    temb = None if bands.is_plan else encoder.embed_timesteps(timesteps, image.dtype)
    h = bands.convolve(Source(image), encoder.conv_in)
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            h = bands.resnet(resnet, h, temb, consume=True)
        for downsampler in block.downsamplers or ():
            pad_end = downsampler.padding == 0
            h = bands.convolve(Source(h), downsampler.conv, pad_end=pad_end, consume=True)
    h = _mid_block(bands, encoder.mid_block, h, temb)
    source = bands.normalized(encoder.conv_norm_out, h)
    moments = bands.convolve(source, encoder.conv_out, consume=True)
    if bands.is_plan:
        return None
    whole = vae.quant_conv(moments.read(0, moments.shape[2]))
    moments.free()
    return whole


def decode_in_bands(
    bands: Bands,
    vae: TimeAwareAutoencoderKL,
    z: Tensor,
    emit: Callable[[int, Tensor], None],
) -> None:
    """Run an autoencoder's decoder.

    Args:
        bands: Runs the layers.
        vae: The autoencoder.
        z: Unscaled latents, (B, latent_channels, h, w).
        emit: Receives bands of the image in order: the first row, and (B, 3, rows, W).
    """
    decoder = vae.decoder
    z = z if bands.is_plan else vae.post_quant_conv(z)
    latents = ComputedActivation(tuple(z.shape), z.dtype, lambda a, b: z[:, :, a:b].clone())
    h = bands.convolve(Source(latents), decoder.conv_in)
    h = _mid_block(bands, decoder.mid_block, h, None)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            h = bands.resnet(resnet, h, None, consume=True)
        for upsampler in block.upsamplers or ():
            size = (2 * h.shape[2], 2 * h.shape[3])
            h = bands.convolve(Source(h, enlarged=size), upsampler.conv, consume=True)
    source = bands.normalized(decoder.conv_norm_out, h)
    bands.convolve(source, decoder.conv_out, emit=emit, consume=True)


def _mid_block(
    bands: Bands, block: nn.Module, h: StoredActivation, temb: Tensor | None
) -> StoredActivation:
    first, *further = block.resnets
    h = bands.resnet(first, h, temb, consume=True)
    for attention, resnet in zip(block.attentions, further, strict=True):
        if attention is not None:
            h = bands.attend_globally(attention, h)
        h = bands.resnet(resnet, h, temb, consume=True)
    return h
