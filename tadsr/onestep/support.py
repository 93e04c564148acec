"""Which modules the engine computes itself and why not others, and weights that are elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

from tadsr.caches import is_kind
from tadsr.networks.bare import Bare

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from tadsr.networks.time_aware_vae import TimeAwareAutoencoderKL

_MANY_UPSAMPLERS = 40
"""More than the logarithm of any side."""
_UNSUPPORTED = (
    "class_embed_type",
    "num_class_embeds",
    "addition_embed_type",
    "encoder_hid_dim_type",
    "time_cond_proj_dim",
    "time_embedding_act_fn",
)
_BLOCKS = {
    *("DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
    *("UNetMidBlock2DCrossAttn", None),
}
_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor")


def check_unet(unet: UNet2DConditionModel) -> None:
    """Raise ValueError unless a UNet consists of Stable Diffusion's blocks."""
    if isinstance(unet, Bare):  # of nothing else
        return
    config = unet.config
    named = [name for name in _UNSUPPORTED if config.get(name) is not None]
    blocks = {*config.down_block_types, *config.up_block_types, config.mid_block_type}
    if named or config.center_input_sample or blocks - _BLOCKS:
        found = sorted(map(str, blocks - _BLOCKS)) + named
        raise ValueError(
            "a UNet that is computed in bands must consist of Stable Diffusion's blocks without "
            f"further conditioning, got {', '.join(found) or 'center_input_sample'}; call the "
            "pipeline with tiling=None (--tile off)"
        )


def unknown_blocks(vae: TimeAwareAutoencoderKL, unet: UNet2DConditionModel) -> list[str]:
    """List what these networks compute that the fused engine cannot."""
    if isinstance(unet, Bare):
        return []
    try:
        check_unet(unet)
    except ValueError:
        return ["the UNet has other blocks than Stable Diffusion's"]
    reasons = [
        reason
        for network in (vae, unet)
        for module in network.modules()
        for reason in _unknown_in(module)
    ]
    for part in (vae.encoder, vae.decoder, unet):
        reasons += _if("an activation is not SiLU", not isinstance(part.conv_act, nn.SiLU))
    return list(dict.fromkeys(reasons))


def wrapped_modules(vae: TimeAwareAutoencoderKL, unet: UNet2DConditionModel) -> list[str]:
    """List what wraps these networks' layers, such as adapters and offloading."""
    modules = [*vae.modules(), *unet.modules()]
    parameters = [*vae.parameters(), *unet.parameters()]
    return [
        *_if("the networks are not on one device", len({p.device for p in parameters}) > 1),
        *_if("the weights are of several types", len({p.dtype for p in parameters}) > 1),
        *_if(
            "a forward is replaced or hooked, as by offloading",
            any(is_hooked(module) for module in modules),
        ),
        *_if(
            "adapters are not merged into the weights",
            any(is_kind(module, "BaseTunerLayer") for module in modules),
        ),
    ]


def is_hooked(module: nn.Module) -> bool:
    """Tell whether something else runs before, after or in place of a module's forward."""
    state = module.__dict__
    return bool("forward" in state or state["_forward_hooks"] or state["_forward_pre_hooks"])


def _unknown_in(module: nn.Module) -> Iterator[str]:
    if is_kind(module, "ResnetBlock2D"):
        yield from _if("a ResNet block resizes", module.upsample or module.downsample)
        yield from _if("an activation is not SiLU", not isinstance(module.nonlinearity, nn.SiLU))
        yield from _if("a ResNet block's output is scaled", module.output_scale_factor != 1)
    elif is_kind(module, "Upsample2D"):
        is_plain = module.use_conv and module.interpolate and module.norm is None
        is_plain = is_plain and module.name == "conv" and not module.use_conv_transpose
        is_plain = is_plain and module.conv.weight.shape[2:] == (3, 3)
        yield from _if("an upsampling is not nearest with a 3×3 convolution", not is_plain)
    elif is_kind(module, "Downsample2D"):
        is_plain = module.use_conv and module.norm is None
        yield from _if("a downsampling is not a convolution", not is_plain)
    elif is_kind(module, "Transformer2DModel"):
        yield from _if("a transformer's input is not a map", not module.is_input_continuous)
    elif is_kind(module, "BasicTransformerBlock"):
        is_plain = module.norm_type == "layer_norm" and module.pos_embed is None
        is_plain = is_plain and not hasattr(module, "fuser") and not module.only_cross_attention
        is_plain = is_plain and (module.attn2 is None or module.attn2.is_cross_attention)
        yield from _if("a transformer block is not Stable Diffusion's", not is_plain)
    elif is_kind(module, "Attention"):
        is_plain = is_kind(module.processor, *_PROCESSORS) and module.rescale_output_factor == 1
        extras = ("norm_q", "norm_k", "norm_cross", "spatial_norm", "added_kv_proj_dim")
        is_plain = is_plain and all(getattr(module, name, None) is None for name in extras)
        yield from _if("an attention is not Stable Diffusion's", not is_plain)
    # FreeU writes its factors onto the blocks.
    yield from _if("FreeU is on", any(getattr(module, n, None) for n in ("s1", "s2", "b1", "b2")))


def _if(reason: str, holds: object) -> list[str]:
    return [reason] if holds else []


@contextmanager
def weights_in_place(layer: nn.Module) -> Iterator[None]:
    """Bring a layer's offloaded weights for a block of code, without running the layer."""
    hook = getattr(layer, "_hf_hook", None)
    if hook is None:
        yield
        return
    hook.pre_forward(layer)
    try:
        yield
    finally:
        hook.post_forward(layer, None)


@contextmanager
def any_size(unet: UNet2DConditionModel) -> Iterator[None]:
    """Let one traced graph of a UNet take every size.

    The UNet doubles features where sides divide by its up-samplers' factor, and enlarges them to
    the skip connections' size where they do not; a traced graph has one of the two. The second is
    right for all sizes, and taken where the factor is larger than any side.
    """
    num_upsamplers = unet.num_upsamplers
    unet.num_upsamplers = _MANY_UPSAMPLERS
    try:
        yield
    finally:
        unet.num_upsamplers = num_upsamplers
