"""LoRA adapters: attach, merge, extract; what they are is data in `adapter_targets`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from tadsr.networks.adapter_targets import (
    DEFAULT_ALPHA,
    DEFAULT_RANK,
    LORA_NAME,
    UNET_FULL,
    UNET_TARGETS,
    VAE_TIME,
    AdapterSet,
    adapter_shapes,
    target_modules,
    targets_of,
)
from tadsr.networks.time_aware_vae import TimeAwareAutoencoderKL


def check_adapters(
    unet: UNet2DConditionModel, vae: TimeAwareAutoencoderKL, adapters: AdapterSet
) -> None:
    """Check that adapters have exactly the tensors that these models need."""
    for model in (unet, vae):
        if has_adapters(model):
            raise ValueError(
                f"{type(model).__name__} must have no adapters yet, but it has; "
                "merge them with fuse_adapters first"
            )
    expected = adapter_shapes(unet, vae, adapters.rank_unet, adapters.rank_vae)
    for part, shapes in expected.items():
        tensors = getattr(adapters, part)
        problems = {
            "missing": [n for n in shapes if n not in tensors],
            "extra": [n for n in tensors if n not in shapes],
            "misshapen": [
                f"{n} {tuple(tensors[n].shape)} for {tuple(shape)}"
                for n, shape in shapes.items()
                if n in tensors and tensors[n].shape != shape
            ],
        }
        wrong = [
            f"{len(names)} {kind}, first {names[:5]}" for kind, names in problems.items() if names
        ]
        if wrong:
            raise ValueError(
                f"adapters must fit the model, but their {part} tensors do not: "
                f"{'; '.join(wrong)}; "
                "use the base model and the rank that they were trained with"
            )


def attach_adapters(
    unet: UNet2DConditionModel, vae: TimeAwareAutoencoderKL, adapters: AdapterSet
) -> None:
    """Wrap the models' modules with unmerged adapters, in place, all of them active.

    LoRA matrices are at least float32, whatever the base's dtype. Afterwards only they require
    gradients, as peft leaves it.
    """
    check_adapters(unet, vae, adapters)
    _inject(unet, adapters.rank_unet, adapters.alpha)
    _inject(vae, adapters.rank_vae, adapters.alpha)
    _copy_into(unet, adapters.unet)
    _copy_into(vae, {**adapters.vae, **adapters.vae_time})


def attach_new_adapters(
    unet: UNet2DConditionModel | None,
    vae: TimeAwareAutoencoderKL | None,
    *,
    rank: int = DEFAULT_RANK,
    alpha: float = DEFAULT_ALPHA,
) -> None:
    """Wrap models' modules with untrained adapters, in place, all of them active.

    A is drawn from N(0, 1/rank²) by torch's global generator and B is zero, so the models compute
    what they did before. Afterwards only LoRA matrices require gradients; `adapter_parameters`
    names everything that training changes.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    models = [model for model in (unet, vae) if model is not None]
    for model in models:
        if has_adapters(model):
            raise ValueError(f"{type(model).__name__} must have no adapters yet, but it has")
    for model in models:
        _inject(model, rank, alpha)


def has_adapters(model: nn.Module) -> bool:
    """Tell whether a model has unmerged adapters attached."""
    return any(isinstance(m, BaseTunerLayer) for m in model.modules())


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Collect the parameters that TADSR trains in a model with attached adapters."""
    full = UNET_FULL if targets_of(model) is UNET_TARGETS else VAE_TIME
    if not has_adapters(model):
        raise ValueError(
            f"{type(model).__name__} must have adapters attached, but it has none; merged adapters "
            "cannot be told from the base weights, so load with merge_adapters=False"
        )
    named = ((_uncompiled(name), parameter) for name, parameter in model.named_parameters())
    return {n: p for n, p in named if LORA_NAME.fullmatch(n) or full.fullmatch(n)}


def extract_adapters(unet: UNet2DConditionModel, vae: TimeAwareAutoencoderKL) -> AdapterSet:
    """Copy the attached adapters out of two models."""
    unet_tensors, vae_tensors = (
        {n: p.detach().to("cpu", copy=True) for n, p in adapter_parameters(model).items()}
        for model in (unet, vae)
    )
    unet_config = next(iter(unet.peft_config.values()))
    vae_config = next(iter(vae.peft_config.values()))
    return AdapterSet(
        unet=unet_tensors,
        vae={n: t for n, t in vae_tensors.items() if LORA_NAME.fullmatch(n)},
        vae_time={n: t for n, t in vae_tensors.items() if not LORA_NAME.fullmatch(n)},
        rank_unet=unet_config.r,
        rank_vae=vae_config.r,
        alpha=unet_config.lora_alpha,
    )


def merged_weight(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """Add a LoRA product to a weight in float32.

    Args:
        weight: (out, in) or (out, in, k, k), any floating dtype.
        lora_a: (r, in) or (r, in, k, k).
        lora_b: (out, r) or (out, r, 1, 1).

    Source: LoRA (arXiv 2106.09685), equation 3.
    """
    a = lora_a.to(weight.device, torch.float32).flatten(1)  # [r, in·k·k]
    b = lora_b.to(weight.device, torch.float32).flatten(1)  # [out, r]
    return weight.float() + scaling * (b @ a).view(weight.shape)


@torch.no_grad()
def merge_adapters(
    unet: UNet2DConditionModel, vae: TimeAwareAutoencoderKL, adapters: AdapterSet
) -> None:
    """Merge adapters into plain models, in place; sums are float32, then cast."""
    check_adapters(unet, vae, adapters)
    for model, change in zip((unet, vae), weight_changes(adapters), strict=True):
        for name, parameter in model.named_parameters():
            changed = change(name, parameter)
            if changed is not parameter:
                parameter.copy_(changed)


def fuse_adapters(unet: UNet2DConditionModel, vae: TimeAwareAutoencoderKL) -> None:
    """Merge attached adapters in place and remove peft's wrappers."""
    adapters = extract_adapters(unet, vae)
    detach_adapters(unet)
    detach_adapters(vae)
    merge_adapters(unet, vae, adapters)


def detach_adapters(model: nn.Module) -> None:
    """Remove peft's wrappers from a model in place, without merging.

    The UNet's `conv_in` and the VAE's time layers keep their trained values.
    """
    wrapped = [(n, m) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    for name, layer in wrapped:
        parent_name, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent_name), child, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    model._hf_peft_config_loaded = False


WeightChange = Callable[[str, Tensor], Tensor]
"""From a weight's name and the weight to the merged one, float32, or the very weight.

One at a time, so that a loader can merge each tensor while reading it.
"""


def weight_changes(adapters: AdapterSet) -> tuple[WeightChange, WeightChange]:
    """Return what merging does to the UNet's and to the VAE's weights."""
    conv_in = {
        name.replace(".base_layer", ""): tensor
        for name, tensor in adapters.unet.items()
        if UNET_FULL.fullmatch(name)
    }
    return (
        _weight_change(adapters.unet, conv_in, adapters.alpha / adapters.rank_unet),
        _weight_change(adapters.vae, adapters.vae_time, adapters.alpha / adapters.rank_vae),
    )


def _weight_change(
    lora: Mapping[str, Tensor], full: Mapping[str, Tensor], scaling: float
) -> WeightChange:
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in lora.items():
        if match := LORA_NAME.fullmatch(name):
            pairs.setdefault(f"{match['module']}.weight", {})[match["side"]] = tensor

    def change(name: str, weight: Tensor) -> Tensor:
        base = full.get(name, weight)
        if name not in pairs:
            return base
        return merged_weight(base, pairs[name]["A"], pairs[name]["B"], scaling)

    return change


def plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's tensors under their plain names, LoRA matrices left out."""
    return {
        _uncompiled(name).replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
        if not LORA_NAME.fullmatch(name)
    }


def _uncompiled(name: str) -> str:
    """Return a tensor's name without what torch.compile puts around a module."""
    return name.replace("_orig_mod.", "")


def _inject(model: nn.Module, rank: int, alpha: float) -> None:
    targets = target_modules(model)
    for adapter, modules in targets.items():
        # A pattern rather than a list: peft would also match list entries as name endings.
        exact = "|".join(re.escape(name) for name in modules)
        config = LoraConfig(
            r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=exact
        )
        with warnings.catch_warnings():
            # peft warns that a model has several adapters; here that is the design.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            model.add_adapter(config, adapter_name=adapter)
    # add_adapter leaves only the newest one active.
    model.set_adapter(list(targets))
    for name, parameter in model.named_parameters():
        # Single precision under a half-precision base, so that nothing is lost before a merge.
        if LORA_NAME.fullmatch(name) and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()


@torch.no_grad()
def _copy_into(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)


@dataclass(frozen=True, eq=False)
class LoraProduct:
    """A product to add to one weight.

    Attributes:
        weight: The weight's plain name.
        a: (r, in) or (r, in, k, k).
        b: (out, r) or (out, r, 1, 1).
        scaling: alpha / rank.
    """

    weight: str
    a: Tensor
    b: Tensor
    scaling: float


@torch.no_grad()
def merge_lora(model: nn.Module, products: Sequence[LoraProduct], scale: float) -> None:
    """Add products to a model's weights, in place; sums are float32, then cast.

    Where the model has adapters attached, the weights below them are changed.
    """
    weights = {n.replace(".base_layer.", "."): p for n, p in model.named_parameters()}
    for product in products:
        weight = weights[product.weight]
        weight.copy_(merged_weight(weight, product.a, product.b, scale * product.scaling))
