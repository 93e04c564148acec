"""Build each component of a checkpoint from its folder; nothing is larger than its weights."""

from __future__ import annotations

import inspect
import json
import math
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tadsr.checkpoints.json_files import read_json, read_small
from tadsr.checkpoints.layout import Component, Format, choose_weight_file
from tadsr.checkpoints.tensor_files import TensorReader
from tadsr.errors import CheckpointError

if TYPE_CHECKING:
    from diffusers import DDPMScheduler
    from transformers import PreTrainedTokenizerBase

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
MAX_TIMESTEPS = 10_000
"""Most timesteps of a noise schedule; Stable Diffusion has 1000."""
_TOKENIZER_KEYS = (
    *("model_max_length", "pad_token", "bos_token", "eos_token", "unk_token", "do_lower_case"),
    *("errors", "add_prefix_space", "added_tokens_decoder", "additional_special_tokens"),
    "clean_up_tokenization_spaces",
)
"""What is read of a tokenizer's configuration."""
_PROBE = "a sharp photo \u2603"
"""With a letter that no vocabulary needs to know; its unknown token is looked up then."""
_BETA_KEYS = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")


def find_components(folder: Path, fmt: Format) -> dict[str, Component]:
    """Return the components that a checkpoint has; CheckpointError where one is missing."""
    present = {c.name: c for c in fmt.components if (folder / c.folder).is_dir()}
    for component in fmt.components:
        if component.is_required and component.name not in present:
            raise CheckpointError(
                f"{folder} must have the folder {component.folder}/ ({component.class_name}), but "
                "it is missing; download or copy the checkpoint again"
            )
    if not {"text_encoder", "tokenizer"} <= present.keys() and "prompt_embeddings" not in present:
        raise CheckpointError(
            f"{folder} must have text_encoder/ and tokenizer/, or prompt_embeddings/: without "
            "either no prompt can be embedded; download or copy the checkpoint again"
        )
    return present


def open_weights(
    folder: Path, component: Component, fmt: Format, variant: str | None
) -> TensorReader:
    """Open the weights of a component, sharded or not; None takes the plain variant or the only."""
    place = folder / component.folder
    names = [p.name for p in place.iterdir()]
    chosen = choose_weight_file(names, component, fmt, variant, str(place))
    if not chosen.is_index:
        return TensorReader([place / chosen.name])
    index_path = place / chosen.name
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path} must map tensors to shards under 'weight_map'")
    shards = sorted({str(name) for name in weight_map.values()})
    # An index is data from elsewhere: it may name files of its own folder only.
    outside = [name for name in shards if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{index_path} must name files beside it, got {outside[0][:80]!r}")
    return TensorReader([place / name for name in shards])


def build_on_meta(folder: Path, component: Component, reader: TensorReader) -> nn.Module:
    """Build a component's model from its config, without memory for weights."""
    path = folder / component.folder / component.config
    config = read_json(path)
    listed = config.get("architectures")
    stated = config.get("_class_name") or (
        listed[0] if listed and isinstance(listed, list) else None
    )
    if stated not in (None, component.class_name):
        raise CheckpointError(
            f"{path} must describe a {component.class_name}, got {stated}; "
            f"{component.folder}/ belongs to another kind of model"
        )
    try:
        with torch.device("meta"):
            return build_model(component.name, config, path, reader)
    except CheckpointError:
        raise
    except Exception as error:  # a wrong value raises whatever the model's code stumbles over
        raise CheckpointError(
            f"{path} makes no {component.class_name}: {type(error).__name__}: {error}"
        ) from error


def build_model(
    name: str, config: Mapping[str, Any], path: Path, reader: TensorReader
) -> nn.Module:
    """Build a component from its configuration; code inside the checkpoint is never run."""
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


def clip_common_name(name: str) -> str | None:
    """Map a CLIP text encoder's tensor name to the one all library versions share.

    Transformers 4 has the prefix `text_model.` where 5 has none, and files before 4.31 store the
    position ids, which are computed.
    """
    name = name.removeprefix("text_model.")
    return None if name == "embeddings.position_ids" else name


def read_scheduler(path: Path) -> dict[str, Any]:
    """Read what a noise schedule is made of, and check it before anything is made."""
    config = read_json(path)
    prediction = config.get("prediction_type", "epsilon")
    if prediction != "epsilon":
        raise CheckpointError(
            f"{path} must have prediction_type 'epsilon', got {prediction!r}; TADSR starts from "
            "SD 2.1-base: the 768 px SD 2.1 predicts v and does not fit"
        )
    missing = [key for key in _BETA_KEYS if key not in config]
    if missing:
        raise CheckpointError(f"{path} must give {', '.join(_BETA_KEYS)}; it lacks {missing}")
    count = config["num_train_timesteps"]
    if type(count) is not int or not 1 <= count <= MAX_TIMESTEPS:
        raise CheckpointError(
            f"{path} must have num_train_timesteps in 1..{MAX_TIMESTEPS}, got {str(count)[:80]}"
        )
    return {key: config.get(key) for key in (*_BETA_KEYS, "trained_betas")}


def load_scheduler(folder: Path, component: Component) -> DDPMScheduler:
    """Read the betas of a scheduler, whatever its class: one step needs no sampler."""
    path = folder / component.folder / component.config
    config = read_scheduler(path)
    from diffusers import DDPMScheduler  # seconds, of which a model that runs at once has no need

    try:
        scheduler = DDPMScheduler(**config, prediction_type="epsilon", clip_sample=False)
        count = config["num_train_timesteps"]
        is_schedule = scheduler.betas.shape == (count,)
        is_schedule &= bool(((scheduler.betas > 0) & (scheduler.betas < 1)).all())
    except Exception as error:  # diffusers raises several types for odd values
        raise CheckpointError(f"{path} makes no noise schedule: {error}") from error
    if not is_schedule:
        raise CheckpointError(f"{path} must give {count} betas, all between 0 and 1")
    return scheduler


def load_tokenizer(
    folder: Path, component: Component, text_encoder: nn.Module
) -> PreTrainedTokenizerBase:
    """Load the tokenizer as its files say, padding token included."""
    place = folder / component.folder
    config = read_json(place / component.config)
    if not (place / "tokenizer.json").is_file() and not (place / "vocab.json").is_file():
        raise CheckpointError(
            f"{place} must hold vocab.json and merges.txt, or tokenizer.json; it has none"
        )
    from transformers import CLIPTokenizer  # the same

    try:
        # A copy of what may be read: a configuration can name any other file.
        with tempfile.TemporaryDirectory() as copy, warnings.catch_warnings():
            for name in component.other_files:
                if os.path.lexists(place / name):
                    Path(copy, name).write_bytes(read_small(place / name))
            kept = {key: config[key] for key in _TOKENIZER_KEYS if key in config}
            Path(copy, component.config).write_text(json.dumps(kept), encoding="utf-8")
            warnings.simplefilter("ignore", FutureWarning)  # old files, nothing a user can do
            tokenizer = CLIPTokenizer.from_pretrained(copy, local_files_only=True)
        tokenizer.name_or_path = str(place)
        # Files may state no length, or one that nothing has room for.
        longest = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
        if int(longest) < 1:
            raise ValueError(f"model_max_length must be at least 1, got {longest}")
        tokenizer.model_max_length = int(longest)
        if tokenizer.pad_token_id is None:
            raise ValueError("it must name a padding token, got none")
        largest, known = max(tokenizer.get_vocab().values()), text_encoder.config.vocab_size
        if largest >= known:
            raise ValueError(
                f"its tokens must be 0..{known - 1}, which the text encoder knows, got {largest}"
            )
        tokenizer(_PROBE, padding="max_length", truncation=True)
        return tokenizer
    except Exception as error:  # transformers raises many types for broken files
        raise CheckpointError(f"{place} makes no tokenizer: {error}") from error
