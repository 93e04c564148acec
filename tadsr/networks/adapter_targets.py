"""What the published LoRA adapters are: the modules they change and their tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from tadsr.networks.time_aware_vae import TimeAwareAutoencoderKL

DEFAULT_RANK = 4
DEFAULT_ALPHA = 8

_BLOCK_TARGETS = (
    r"to_[qkv]|to_out\.0|conv|conv1|conv2|conv_in|conv_shortcut|conv_out"
    r"|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2"
)
# Adapter name -> pattern of the module names that it changes. The order matters: a module belongs
# to the first adapter whose pattern fits, and `default_others` takes what the others leave.
UNET_TARGETS: dict[str, re.Pattern[str]] = {
    "default_encoder": re.compile(rf"conv_in|down_blocks\.(.+\.)?({_BLOCK_TARGETS})"),
    "default_decoder": re.compile(rf"conv_out|up_blocks\.(.+\.)?({_BLOCK_TARGETS})"),
    "default_others": re.compile(rf"(.+\.)?({_BLOCK_TARGETS})"),
}
VAE_TARGETS: dict[str, re.Pattern[str]] = {
    "default_encoder": re.compile(
        r"quant_conv|encoder\.(.+\.)?(conv1|conv2|conv_in|conv_shortcut|conv|conv_out"
        r"|to_[qkv]|to_out\.0)"
    )
}
# Weights that are trained in full and travel with the adapters.
UNET_FULL = re.compile(r"conv_in\.(base_layer\.)?(weight|bias)")
VAE_TIME = re.compile(r"encoder\.(time_embedding\.|.+\.time_emb_proj\.).+")
LORA_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.(?P<adapter>[^.]+)\.weight")


@dataclass(frozen=True, eq=False)
class AdapterSet:
    """Hold what TADSR training adds to Stable Diffusion's weights.

    Args:
        unet: The UNet's LoRA matrices `<module>.lora_{A,B}.<adapter>.weight`, plus
            `conv_in.base_layer.{weight,bias}`. A is (r, in) or (r, in, k, k); B is (out, r) or
            (out, r, 1, 1).
        vae: The VAE encoder's LoRA matrices, named and shaped alike.
        vae_time: The encoder's time layers under their own names.
        rank_unet: Rank of the UNet's matrices, at least 1.
        rank_vae: Rank of the VAE's matrices, at least 1.
        alpha: LoRA's numerator; the product of the matrices is scaled by alpha / rank.

    Source: LoRA (arXiv 2106.09685), section 4.1; TADSR (arXiv 2508.16557), training.
    """

    unet: Mapping[str, Tensor]
    vae: Mapping[str, Tensor]
    vae_time: Mapping[str, Tensor]
    rank_unet: int = DEFAULT_RANK
    rank_vae: int = DEFAULT_RANK
    alpha: float = DEFAULT_ALPHA

    @property
    def unet_modules(self) -> dict[str, list[str]]:
        """The UNet's changed modules by adapter name."""
        return _modules_by_adapter(self.unet, UNET_TARGETS)

    @property
    def vae_modules(self) -> dict[str, list[str]]:
        """The VAE's changed modules by adapter name."""
        return _modules_by_adapter(self.vae, VAE_TARGETS)

    @property
    def num_parameters(self) -> int:
        """Number of values in all tensors."""
        return sum(
            t.numel() for part in (self.unet, self.vae, self.vae_time) for t in part.values()
        )


def target_modules(model: nn.Module) -> dict[str, list[str]]:
    """List the modules of a model that each adapter changes."""
    targets = targets_of(model)
    found: dict[str, list[str]] = {name: [] for name in targets}
    for module_name, module in model.named_modules():
        # A wrapper's own children (base_layer, lora_A.*) match no target pattern.
        if not isinstance(module, nn.Linear | nn.Conv2d | BaseTunerLayer):
            continue
        for adapter, pattern in targets.items():
            if pattern.fullmatch(module_name):
                found[adapter].append(module_name)
                break
    return found


def adapter_shapes(
    unet: UNet2DConditionModel,
    vae: TimeAwareAutoencoderKL,
    rank_unet: int = DEFAULT_RANK,
    rank_vae: int = DEFAULT_RANK,
) -> dict[str, dict[str, torch.Size]]:
    """Compute the names and shapes of the tensors an `AdapterSet` for these models has."""
    unet_shapes = _lora_shapes(unet, rank_unet)
    for name, parameter in unet.conv_in.named_parameters():
        unet_shapes[f"conv_in.base_layer.{name}"] = parameter.shape
    time_shapes = {n: p.shape for n, p in vae.named_parameters() if VAE_TIME.fullmatch(n)}
    return {"unet": unet_shapes, "vae": _lora_shapes(vae, rank_vae), "vae_time": time_shapes}


def targets_of(model: nn.Module) -> dict[str, re.Pattern[str]]:
    """Return the adapters of a model's class, or raise TypeError for another class."""
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    if isinstance(model, UNet2DConditionModel):
        return UNET_TARGETS
    if isinstance(model, TimeAwareAutoencoderKL):
        return VAE_TARGETS
    raise TypeError(
        f"model must be UNet2DConditionModel or TimeAwareAutoencoderKL, got {type(model).__name__}"
    )


def _modules_by_adapter(
    tensors: Mapping[str, Tensor], targets: Mapping[str, re.Pattern[str]]
) -> dict[str, list[str]]:
    modules: dict[str, list[str]] = {adapter: [] for adapter in targets}
    for name in tensors:
        match = LORA_NAME.fullmatch(name)
        if match and match["side"] == "A":
            modules.setdefault(match["adapter"], []).append(match["module"])
    return modules


def _lora_shapes(model: nn.Module, rank: int) -> dict[str, torch.Size]:
    shapes: dict[str, torch.Size] = {}
    for adapter, modules in target_modules(model).items():
        for name in modules:
            out_size, *in_shape = model.get_submodule(name).weight.shape
            ones = [1] * (len(in_shape) - 1)
            shapes[f"{name}.lora_A.{adapter}.weight"] = torch.Size([rank, *in_shape])
            shapes[f"{name}.lora_B.{adapter}.weight"] = torch.Size([out_size, rank, *ones])
    return shapes
