"""The student UNet, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from tadsr.onestep.fused_layers import Activation, Layers, PromptConditions, TimeConditions


def predict(
    layers: Layers,
    unet: UNet2DConditionModel,
    latents: Tensor,
    time: TimeConditions,
    prompt: PromptConditions,
) -> Tensor:
    """Predict the residual r of the student's one step.

    Args:
        layers: Runs the layers.
        unet: The student.
        latents: Scaled latents, (B, C, h, w).
        time: Of every ResNet block.
        prompt: Of every cross-attention.

    Returns:
        (B, C_out, h, w).
    """
    h = layers.convolve(unet.conv_in, layers.laid_out(latents), settled=True)
    skips = [h.values]
    for block in unet.down_blocks:
        for resnet, transformer in _layers(block):
            h = layers.resnet(resnet, h, time)
            if transformer is not None:
                h = layers.transform(transformer, h, prompt)
            skips.append(h.values)
        for downsampler in block.downsamplers or ():
            h = layers.downsample(downsampler, h.values)
            skips.append(h.values)
    if unet.mid_block is not None:
        first, *further = unet.mid_block.resnets
        h = layers.resnet(first, h, time)
        for transformer, resnet in zip(unet.mid_block.attentions, further, strict=True):
            h = layers.transform(transformer, h, prompt)
            h = layers.resnet(resnet, h, time)
    for block in unet.up_blocks:
        for resnet, transformer in _layers(block):
            joined = Activation(torch.cat([h.values, skips.pop()], dim=1))
            h = layers.resnet(resnet, joined, time)
            if transformer is not None:
                h = layers.transform(transformer, h, prompt)
        for upsampler in block.upsamplers or ():
            # Odd sizes were rounded up on the way down.
            h = layers.upsample(upsampler, h.values, tuple(skips[-1].shape[2:]))
    h = h.values if unet.conv_norm_out is None else layers.normalize(unet.conv_norm_out, h)
    return layers.convolve(unet.conv_out, h, settled=True).values


def _layers(block: nn.Module) -> Iterator[tuple[nn.Module, Transformer2DModel | None]]:
    attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
    return zip(block.resnets, attentions, strict=True)
