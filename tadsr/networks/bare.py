"""Networks as the fused engine walks them, without diffusers, whose import takes seconds.

What lies here are layers under the names of diffusers, made from the shapes of stored tensors;
they compute nothing by themselves. Whoever needs more than that loads the model anew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

_UNSET = (
    *("addition_embed_type", "class_embed_type", "cross_attention_norm", "encoder_hid_dim"),
    *("encoder_hid_dim_type", "mid_block_only_cross_attention", "num_attention_heads"),
    *("num_class_embeds", "projection_class_embeddings_input_dim", "time_cond_proj_dim"),
    *("reverse_transformer_layers_per_block", "time_embedding_act_fn", "time_embedding_dim"),
    "timestep_post_act",
)
_OFF = (
    *("center_input_sample", "class_embeddings_concat", "dual_cross_attention"),
    *("only_cross_attention", "resnet_skip_time_act", "upcast_attention"),
)
_UNET_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(_UNSET),
    **dict.fromkeys(_OFF, False),
    "attention_type": "default",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "resnet_out_scale_factor": 1.0,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "transformer_layers_per_block": 1,
}
_BLOCKS = {"DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"}
_OUTER_EPS = 1e-6
"""Of the autoencoder's normalisations and of those before transformers."""
_MAX_PERIOD = 10_000
_LEAVES = {"weight", "bias"}


class Bare(nn.Module):
    """A network or a part of one; its layers are found by their names."""

    config: SimpleNamespace

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def downscale_factor(self) -> int:
        """Pixels per latent along one side."""
        return 2 ** (len(self.config.block_out_channels) - 1)


class ResnetBlock2D(Bare):
    """Named as in diffusers, so that the engine finds it."""

    skip_time_act = False
    upsample = downsample = None
    output_scale_factor = 1.0


class Attention(Bare):
    """Named as in diffusers, so that the engine finds it."""

    processor = None


class GEGLU(Bare):
    """Named as in diffusers, so that the engine finds it."""


class _Sinusoid(nn.Module):
    """Embed timesteps (B,) as (B, C): cosines, then sines."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, timesteps: Tensor) -> Tensor:
        half = self.channels // 2
        rows = torch.arange(half, dtype=torch.float32, device=timesteps.device)
        angles = timesteps[:, None].float() * torch.exp(-math.log(_MAX_PERIOD) * rows / half)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


class _TimeEmbedding(Bare):
    def forward(self, sinusoid: Tensor) -> Tensor:
        return self.linear_2(nn.functional.silu(self.linear_1(sinusoid)))


def has_known_blocks(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> bool:
    """Tell whether configurations describe networks that can be built here.

    Args:
        unet: The UNet's, as stored.
        vae: The autoencoder's.
    """
    blocks = {*unet.get("down_block_types", ()), *unet.get("up_block_types", ())}
    acts = {config.get("act_fn") for config in (unet, vae)}
    is_plain = all(unet.get(key, value) == value for key, value in _UNET_DEFAULTS.items())
    heads = unet.get("attention_head_dim")
    has_heads = all(type(head) is int for head in (heads if isinstance(heads, list) else [heads]))
    return is_plain and has_heads and bool(blocks) and blocks <= _BLOCKS and acts == {"silu"}


def build_bare(name: str, config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> Bare:
    """Build a network on the meta device from what its file holds.

    Args:
        name: "unet" or "vae".
        config: Its configuration; see `has_known_blocks`.
        shapes: Of its tensors, by name.

    Raises:
        KeyError: The configuration lacks something.
        ValueError: A tensor's name or shape belongs to no such network.
    """
    tree: dict[str, Any] = {}
    for tensor, shape in shapes.items():
        place = tree
        *parents, leaf = tensor.split(".")
        for part in parents:
            place = place.setdefault(part, {})
        place[leaf] = tuple(shape)
    with torch.device("meta"):
        network = _part("", tree, name, config)
    network.config = SimpleNamespace(**config)
    owner = network.encoder if name == "vae" else network
    # What the embedding's first layer reads.
    owner.time_proj = _Sinusoid(owner.time_embedding.linear_1.in_features)
    for part in (network.encoder, network.decoder) if name == "vae" else (network,):
        part.conv_act = nn.SiLU()
    return network


def _part(path: str, tree: Mapping[str, Any], name: str, config: Mapping[str, Any]) -> Any:
    if tree.keys() <= _LEAVES:
        return _layer(path, tree, name, config)
    children = {key: _part(f"{path}.{key}", value, name, config) for key, value in tree.items()}
    if all(key.isdecimal() for key in children):
        gaps = range(1 + max(map(int, children)))
        return nn.ModuleList([children.get(str(i), nn.Identity()) for i in gaps])
    part = _class_of(path, children)()
    for key, child in children.items():
        part.add_module(key, child)
    for key in _optional(part):
        if key not in children:
            setattr(part, key, None)
    _complete(part, path, name, config)
    return part


def _class_of(path: str, children: Mapping[str, nn.Module]) -> type[Bare]:
    if "conv1" in children:
        return ResnetBlock2D
    if "to_q" in children:
        return Attention
    if path.endswith(".net.0"):
        return GEGLU
    return _TimeEmbedding if path.endswith(".time_embedding") else Bare


def _optional(part: Bare) -> tuple[str, ...]:
    if isinstance(part, ResnetBlock2D):
        return "conv_shortcut", "time_emb_proj"
    if isinstance(part, Attention):
        return ("group_norm",)
    if "resnets" in part._modules:
        return "attentions", "downsamplers", "upsamplers"
    return ("attn2",) if "attn1" in part._modules else ()


def _complete(part: Bare, path: str, name: str, config: Mapping[str, Any]) -> None:
    """Add what no tensor tells."""
    if isinstance(part, ResnetBlock2D):
        part.nonlinearity = nn.SiLU()
        is_modulated = name == "vae" and part.time_emb_proj is not None
        part.time_embedding_norm = "scale_shift" if is_modulated else "default"
        part.out_channels = part.conv2.out_channels
    elif isinstance(part, Attention):
        part.inner_dim, part.inner_kv_dim = part.to_q.out_features, part.to_k.out_features
        part.heads = 1 if name == "vae" else _heads(path, config)
        part.scale = (part.inner_dim // part.heads) ** -0.5
        part.is_cross_attention = path.endswith(".attn2")
        part.rescale_output_factor, part.residual_connection = 1.0, name == "vae"
    elif ".downsamplers." in path:
        part.padding = part.conv.padding[0]
    if path.endswith(".mid_block"):
        # As many as there are places between the blocks.
        places = len(part.resnets) - 1
        part.attentions = part.attentions or [None] * places


def _heads(path: str, config: Mapping[str, Any]) -> int:
    """Return the heads of an attention of the UNet, which diffusers calls attention_head_dim."""
    heads = config["attention_head_dim"]
    if isinstance(heads, int):
        return heads
    _, block, *rest = path.split(".")
    if block == "mid_block":
        return heads[-1]
    level = int(rest[0])
    return heads[level] if block == "down_blocks" else heads[::-1][level]


def _layer(path: str, tree: Mapping[str, Any], name: str, config: Mapping[str, Any]) -> nn.Module:
    weight, has_bias = tree["weight"], "bias" in tree
    leaf = path.rpartition(".")[2]
    if len(weight) == 4:
        is_down = ".downsamplers." in path
        is_padded = not (is_down and name == "vae")
        return nn.Conv2d(
            weight[1],
            weight[0],
            weight[2],
            stride=2 if is_down else 1,
            padding=weight[2] // 2 if is_padded else 0,
            bias=has_bias,
        )
    if len(weight) == 2:
        return nn.Linear(weight[1], weight[0], bias=has_bias)
    if len(weight) != 1:
        raise ValueError(f"{path} has the shape {weight}")
    if ".transformer_blocks." in path:
        return nn.LayerNorm(weight[0])
    is_outer = name == "vae" or leaf in ("norm", "group_norm")
    eps = _OUTER_EPS if is_outer else _UNET_DEFAULTS["norm_eps"]
    return nn.GroupNorm(config["norm_num_groups"], weight[0], eps=eps)


class BarePrompts(Bare):
    """The rows of prompts that a model knows.

    Args:
        prompts: The prompts.
        shape: Of their embeddings, (N, L, D).
    """

    def __init__(self, prompts: Sequence[str], shape: Sequence[int]) -> None:
        super().__init__()
        self.config = SimpleNamespace(prompts=tuple(prompts))
        self.embeddings = nn.Parameter(torch.empty(*shape, device="meta"))

    def forward(self, prompts: list[str]) -> Tensor:
        """Return the embeddings (B, L, D) of known prompts; ValueError for another one."""
        return self.embeddings[prompt_rows(self.config.prompts, prompts)]


def prompt_rows(known: Sequence[str], prompts: Sequence[str]) -> list[int]:
    """Return the rows of prompts among those that a model knows.

    Args:
        known: The model's, in the order of its rows.
        prompts: B prompts.

    Raises:
        ValueError: A prompt is not known.
    """
    known = list(known)
    unknown = [prompt for prompt in prompts if prompt not in known]
    if unknown:
        wanted = f"one of {known}" if any(known) else "left out"
        raise ValueError(
            f"prompt must be {wanted} for this model, got {unknown[0]!r}; it has no text encoder"
        )
    return [known.index(prompt) for prompt in prompts]
