"""What of a model's configuration is read: its architecture, no larger than its weights."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tadsr.checkpoints.tensor_files import TensorReader
from tadsr.errors import CheckpointError

SHARED_VAE_KEYS = (
    *("in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels"),
    *("layers_per_block", "act_fn", "latent_channels", "norm_num_groups", "sample_size"),
    *("scaling_factor", "force_upcast", "mid_block_add_attention"),
)
"""What the time-aware autoencoder's configuration has in common with Stable Diffusion's."""

# Anything else is not read: transformers fetches and runs code that some keys name.
_UNET_KEYS = (
    "sample_size in_channels out_channels center_input_sample flip_sin_to_cos freq_shift "
    "down_block_types mid_block_type up_block_types only_cross_attention block_out_channels "
    "layers_per_block downsample_padding mid_block_scale_factor dropout act_fn norm_num_groups "
    "norm_eps cross_attention_dim transformer_layers_per_block attention_head_dim "
    "num_attention_heads dual_cross_attention use_linear_projection upcast_attention "
    "resnet_time_scale_shift"
)
_TEXT_KEYS = (
    "vocab_size hidden_size intermediate_size projection_dim num_hidden_layers "
    "num_attention_heads max_position_embeddings hidden_act layer_norm_eps attention_dropout "
    "initializer_range initializer_factor pad_token_id bos_token_id eos_token_id"
)
_KEYS = {
    "vae": (*SHARED_VAE_KEYS, "time_scale_shift"),
    "unet": tuple(_UNET_KEYS.split()),
    "text_encoder": tuple(_TEXT_KEYS.split()),
    "prompt_embeddings": ("prompts", "num_tokens", "embedding_dim"),
}
_FREE_KEYS = ("sample_size",)
"""Numbers that no tensor's shape follows from."""
_LEAST = {"freq_shift": -1, "scaling_factor": 0, "mid_block_scale_factor": 0}
_LEAST |= {"norm_eps": 0, "layer_norm_eps": 0}
"""What numbers are above that are used with the first picture only."""
_LAYER_KEYS = ("layers_per_block", "num_hidden_layers", "transformer_layers_per_block")
_TENSORS_PER_LAYER = 8
"""Fewest tensors of a layer that these count."""


def build_model(
    name: str, config: Mapping[str, Any], path: Path, reader: TensorReader
) -> nn.Module:
    """Build a component from its configuration; code inside the checkpoint is never run.

    Raises:
        Exception: Whatever the model's class raises for values that make no model.
    """
    if name == "unet":
        _refuse_other_networks(config, path)
    kept = check_sizes(name, config, path, reader)
    # Only here: these libraries take seconds, of which what counts sizes alone has no need.
    if name == "text_encoder":
        from transformers import CLIPTextConfig, CLIPTextModel

        text_config = CLIPTextConfig(**kept)
        text_config._attn_implementation = "sdpa"
        return CLIPTextModel(text_config)
    if name == "unet":
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel(**kept)
    from tadsr.networks.prompt_embeddings import PromptEmbeddings
    from tadsr.networks.time_aware_vae import TimeAwareAutoencoderKL

    return {"vae": TimeAwareAutoencoderKL, "prompt_embeddings": PromptEmbeddings}[name](**kept)


def check_sizes(
    name: str, config: Mapping[str, Any], path: Path, reader: TensorReader
) -> dict[str, Any]:
    """Return what is read of a configuration, after its sizes; arguments as for `build_model`."""
    kept = {key: config[key] for key in _KEYS[name] if key in config}
    num_tensors = len(reader.meta)
    largest = max((side for shape, _ in reader.meta.values() for side in shape), default=0)
    for key, value in kept.items():
        for number in _numbers(value):
            is_too_large = key not in _FREE_KEYS and abs(number) > max(largest, num_tensors)
            if not math.isfinite(number) or is_too_large:
                raise CheckpointError(
                    f"{path} must fit its weights, whose longest side is {largest}, but has "
                    f"{key} = {str(value)[:80]}; download or copy it again"
                )
    for key in kept.keys() & _LEAST.keys():
        value, least = kept[key], _LEAST[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= least:
            raise CheckpointError(
                f"{path} must have a {key} above {least}, got {str(value)[:80]}; download or copy "
                "it again"
            )
    num_blocks = len(kept["block_out_channels"]) if _is_list(kept, "block_out_channels") else 1
    for key in _LAYER_KEYS:
        counts = list(_numbers(kept.get(key)))
        num_layers = sum(counts) if _is_list(kept, key) else sum(counts) * num_blocks
        if num_layers * _TENSORS_PER_LAYER > num_tensors:
            raise CheckpointError(
                f"{path} must fit its weights of {num_tensors} tensors, but has {key} = "
                f"{str(kept[key])[:80]}; download or copy it again"
            )
    return kept


def _refuse_other_networks(config: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError for options of diffusers' UNet that Stable Diffusion does not use."""
    from diffusers import UNet2DConditionModel

    for key, parameter in inspect.signature(UNet2DConditionModel.__init__).parameters.items():
        if key == "self" or key in _KEYS["unet"]:
            continue
        if config.get(key) not in (None, parameter.default):
            raise CheckpointError(
                f"{path} must describe Stable Diffusion's UNet, but has {key} = "
                f"{str(config[key])[:80]}; no student of TADSR has that"
            )


def _is_list(config: Mapping[str, Any], key: str) -> bool:
    return isinstance(config.get(key), (list, tuple))


def _numbers(value: Any) -> Iterator[float]:
    """Yield the numbers in a value and its lists, and how long these are."""
    if isinstance(value, (list, tuple)):
        for entry in value:
            yield from _numbers(entry)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value
