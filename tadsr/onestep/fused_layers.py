"""The networks' layers, each with what surrounds it in as few passes over memory as possible."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tadsr.caches import is_kind
from tadsr.kernels import add_with_statistics, geglu, group_norm_silu
from tadsr.onestep.operations import (
    MAX_FUSED_HEAD,
    attend_with_wide_heads,
    convolve,
    group_norm_silu_in_pieces,
    merge_heads,
    project,
    split_heads,
    to_map,
    to_tokens,
    transposed_weight,
)
from tadsr.onestep.plan import EnginePlan, FastestChoice

if TYPE_CHECKING:
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.attention_processor import Attention
    from diffusers.models.downsampling import Downsample2D
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel
    from diffusers.models.upsampling import Upsample2D

TimeConditions = Mapping[nn.Module, tuple[Tensor, ...]]
"""What a timestep means to a ResNet block, per channel, (C,) or (B, C): for time that is added, the
first convolution's bias; for time that modulates, the second normalisation's weight and bias."""
PromptConditions = Mapping[nn.Module, tuple[Tensor, Tensor]]
"""Keys and values of a prompt for a cross-attention, (B, heads, L, C / heads) each."""


@dataclass(frozen=True, eq=False)
class Activation:
    """A layer's output.

    Args:
        values: (B, C, H, W).
        bias: Still to be added to `values` per channel, by whoever reads them next; None for 0.
        statistics: Of `values`, as `add_with_statistics` returns them, if they are known.
    """

    values: Tensor
    bias: Tensor | None = None
    statistics: Tensor | None = None


class FusedLayers:
    """Runs diffusers' layers with their own weights.

    What is folded from weights is computed once, and only as good as the weights stay.

    Args:
        exact: Layers that multiply in their weights' own type, whatever the plan says.
    """

    def __init__(self, plan: EnginePlan, exact: Collection[nn.Module] = ()) -> None:
        self.plan = plan
        self._exact = exact
        self.choice = FastestChoice()
        self._transposed: dict[nn.Module, Tensor] = {}
        self._summed_biases: dict[nn.Module, Tensor] = {}
        self._joined_biases: dict[tuple[int, int], tuple[Tensor | None, ...]] = {}
        self._joined: dict[nn.Module, tuple[Tensor, Tensor | None]] = {}
        self._lowered: dict[Tensor, Tensor] = {}
        self._scratch: dict[torch.dtype, Tensor] = {}
        self._time: TimeConditions = {}
        self._prompt: PromptConditions = {}

    def at(
        self, time: TimeConditions | None = None, prompt: PromptConditions | None = None
    ) -> FusedLayers:
        """Return these layers at timesteps and prompts; what was folded is shared."""
        layers = copy.copy(self)
        layers._time, layers._prompt = time or {}, prompt or {}
        return layers

    def start(self, conv: nn.Conv2d, x: Tensor) -> Activation:
        """Convolve a network's input."""
        return self.convolve(conv, self.laid_out(x))

    def pointwise(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """Convolve latents by a 1×1 kernel."""
        return self.convolve(conv, self.laid_out(x), settled=True).values

    def end(self, norm: nn.GroupNorm | None, conv: nn.Conv2d, x: Activation) -> Tensor:
        """Normalise, activate and convolve to a network's output."""
        h = self._settled(x) if norm is None else self.normalize(norm, x, conv)
        return self.convolve(conv, h, settled=True).values

    def size(self, x: Activation) -> tuple[int, int]:
        """Return height and width."""
        return tuple(x.values.shape[2:])

    def keep(self, x: Activation) -> Activation:
        """Return an activation, which no layer overwrites."""
        return x

    def join(self, x: Activation, kept: Activation) -> Activation:
        """Put two activations side by side in their channels."""
        values = torch.cat([x.values, kept.values], dim=1)
        if x.bias is None and kept.bias is None:
            return Activation(values)
        key = (id(x.bias), id(kept.bias))
        if key not in self._joined_biases:
            # With what the key names, so that it stays theirs.
            parts = [
                v.new_zeros(v.shape[1]) if bias is None else bias
                for v, bias in ((x.values, x.bias), (kept.values, kept.bias))
            ]
            self._joined_biases[key] = torch.cat(parts), x.bias, kept.bias
        return Activation(values, self._joined_biases[key][0])

    def laid_out(self, x: Tensor) -> Tensor:
        """Bring an input into the plan's memory layout."""
        layout = torch.channels_last if self.plan.channels_last else torch.contiguous_format
        return x.contiguous(memory_format=layout)

    def convolve(
        self, conv: nn.Conv2d, x: Tensor, bias: Tensor | None = None, *, settled: bool = False
    ) -> Activation:
        """Run a convolution; its bias may be left to the next layer.

        Args:
            x: (B, C, H, W).
            bias: In place of the convolution's own, (C,) or (B, C).
        """
        x = x.to(self._type(conv))
        bias, weight = conv.bias if bias is None else bias, self._weight(conv, x)
        if self.plan.fused_kernels and not settled:
            return Activation(convolve(x, weight, None, conv.stride, conv.padding), bias)
        if bias is None or bias.ndim == 1:
            bias = None if bias is None else bias.to(x.dtype)
            return Activation(convolve(x, weight, bias, conv.stride, conv.padding))
        out = convolve(x, weight, None, conv.stride, conv.padding)
        return Activation(out.add_(bias.to(x.dtype)[:, :, None, None]))

    def normalize(
        self,
        norm: nn.GroupNorm,
        x: Activation,
        reader: nn.Module,
        *,
        affine: tuple[Tensor, ...] | None = None,
        silu: bool = True,
        in_place: bool = False,
    ) -> Tensor:
        """Run a GroupNorm and SiLU.

        Args:
            reader: The layer that multiplies the result.
            affine: Weight and bias, (C,) or (B, C).
        """
        weight, bias = affine or (norm.weight, norm.bias)
        if self.plan.fused_kernels:
            statistics = x.statistics
            # Those of groups fit no other number of groups, those of channels do.
            is_of_groups = statistics is not None and statistics.ndim == 3
            if is_of_groups and statistics.shape[1] != norm.num_groups:
                statistics = None
            return group_norm_silu(
                *(x.values, norm.num_groups, weight, bias, norm.eps),
                silu=silu,
                channel_bias=x.bias,
                statistics=statistics,
            )
        dtype = self._type(reader)
        is_inmost = x.values.is_contiguous(memory_format=torch.channels_last)
        if self.plan.channels_last and is_inmost and x.values.device.type == "cpu":
            is_same = in_place and x.values.dtype == dtype
            out = x.values if is_same else self._scratch_like(x.values, dtype)
            return group_norm_silu_in_pieces(
                x.values, norm.num_groups, weight, bias, norm.eps, silu=silu, out=out
            )
        if weight is None or weight.ndim == 1:
            weight, bias = (None if v is None else v.to(x.values.dtype) for v in (weight, bias))
            out = F.group_norm(x.values, norm.num_groups, weight, bias, norm.eps)
        else:
            out = F.group_norm(x.values, norm.num_groups, eps=norm.eps)
            weight, bias = (v.to(out.dtype)[:, :, None, None] for v in (weight, bias))
            out.mul_(weight).add_(bias)
        return (F.silu(out, inplace=True) if silu else out).to(dtype)

    def add(self, x: Activation, residual: Tensor, num_groups: int) -> Activation:
        """Add a residual, and measure the sum for a GroupNorm of so many groups."""
        if self.plan.fused_kernels:
            total, statistics = add_with_statistics(
                x.values, residual, channel_bias=x.bias, num_groups=num_groups
            )
            return Activation(total, statistics=statistics)
        return Activation(_sum(x.values, residual))

    def resnet(self, block: ResnetBlock2D, x: Activation) -> Activation:
        """Run a ResNet block: h = x + conv2(act(norm2(conv1(act(norm1(x))))))."""
        condition = self._time.get(block, ())
        h = self.normalize(block.norm1, x, block.conv1)
        # One tensor is a bias with time in it, two are a modulated normalisation.
        h = self.convolve(block.conv1, h, condition[0] if len(condition) == 1 else None)
        affine = condition if len(condition) == 2 else None
        h = self.normalize(block.norm2, h, block.conv2, affine=affine, in_place=True)
        h = self.convolve(block.conv2, h)
        residual, shortcut = x, block.conv_shortcut
        if shortcut is not None:
            residual = self.convolve(shortcut, x.values)
        if residual.bias is not None or (shortcut is not None and x.bias is not None):
            h = Activation(h.values, self._summed_bias(block, x.bias))
        return self.add(h, residual.values.to(x.values.dtype), block.norm2.num_groups)

    def downsample(self, layer: Downsample2D, x: Activation) -> Activation:
        """Halve the sides by a convolution of stride 2."""
        x = self._settled(x)
        if layer.padding == 0:
            # The autoencoder's way: zeros after the last row and column only.
            x = F.pad(x, (0, 1, 0, 1))
        return self.convolve(layer.conv, x)

    def upsample(self, layer: Upsample2D, x: Activation, size: tuple[int, int]) -> Activation:
        """Enlarge by two (nearest) to a size, then convolve; one transposed convolution is both."""
        conv, dtype = layer.conv, x.values.dtype
        x = self._settled(x).to(self._type(conv))
        bias, later = None, conv.bias
        if conv.bias is not None and not self.plan.fused_kernels:
            bias, later = conv.bias.to(x.dtype), None

        def transposed() -> Tensor:
            weight = self._transposed_weight(conv, x.dtype)
            return F.conv_transpose2d(x, weight, bias, stride=2, padding=1).to(dtype)

        def enlarged() -> Tensor:
            larger = F.interpolate(x, size=size, mode="nearest")
            return F.conv2d(larger, self._weight(conv, x), bias, padding=1).to(dtype)

        if tuple(size) != (2 * x.shape[2], 2 * x.shape[3]) or self.plan.upsampling == "enlarged":
            # An odd side's last row has no partner: its convolution sees zeros below instead.
            return Activation(enlarged(), later)
        if self.plan.upsampling == "transposed" or x.device.type != "cuda":
            return Activation(transposed(), later)
        candidates = {"transposed": transposed, "enlarged": enlarged}
        return Activation(self.choice.run((conv, x.shape), candidates), later)

    def transform(self, layer: Transformer2DModel, x: Activation) -> Activation:
        """Run a transformer over the positions of a map, with its residual."""
        tokens = to_tokens(self.normalize(layer.norm, x, layer.proj_in, silu=False))
        tokens, later = self._project(layer.proj_in, tokens), None
        for block in layer.transformer_blocks:
            tokens = tokens if later is None else tokens.add_(later)
            tokens, later = self._transformer_block(block, tokens)
        if self.plan.fused_kernels:
            tokens = F.linear(tokens, layer.proj_out.weight.flatten(1))
            out = Activation(
                to_map(tokens, x.values.shape[2]), self._projected_bias(layer.proj_out, later)
            )
        else:
            tokens = self._project(layer.proj_out, tokens)
            out = Activation(self.laid_out(to_map(tokens, x.values.shape[2])))
        return self.add(out, self._settled(x), layer.norm.num_groups)

    def attend(self, layer: Attention, x: Activation) -> Activation:
        """Run an autoencoder's attention with its normalisation and residual."""
        tokens = to_tokens(self.normalize(layer.group_norm, x, layer.to_q, silu=False))
        out = self._attend(layer, tokens)
        out = Activation(self.laid_out(to_map(out, x.values.shape[2])))
        return self.add(out, self._settled(x), layer.group_norm.num_groups)

    def _transformer_block(
        self, block: BasicTransformerBlock, tokens: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return tokens, and a bias that is still to be added to them."""
        tokens = _sum(self._attend(block.attn1, block.norm1(tokens)), tokens)
        if block.attn2 is not None:
            tokens = _sum(self._attend_to_prompt(block.attn2, block.norm2(tokens)), tokens)
        first, _, last = block.ff.net[:3]
        normed = block.norm3(tokens)
        if not is_kind(first, "GEGLU"):
            return _sum(last(first(normed)), tokens), None
        gated = self._project(first.proj, normed)
        if self.plan.fused_kernels:
            # The product adds to what is there, which takes no pass over the memory of its own.
            tokens.flatten(0, 1).addmm_(geglu(gated).flatten(0, 1), last.weight.mT)
            return tokens, last.bias
        values, gates = gated.chunk(2, dim=-1)
        return _sum(self._project(last, values.mul_(F.gelu(gates))), tokens), None

    def _attend(self, layer: Attention, tokens: Tensor) -> Tensor:
        query, key, value = (
            split_heads(x, layer.heads) for x in self._project_to_attend(layer, tokens)
        )
        if query.shape[-1] > MAX_FUSED_HEAD and query.device.type == "cuda":
            out = attend_with_wide_heads(query, key, value, layer.scale, self.choice)
        else:
            with self._attention_backends():
                out = F.scaled_dot_product_attention(query, key, value, scale=layer.scale)
        return self._project(layer.to_out[0], merge_heads(out))

    def _project_to_attend(self, layer: Attention, tokens: Tensor) -> Sequence[Tensor]:
        """Return queries, keys and values; on a GPU by one product of matrices."""
        layers = (layer.to_q, layer.to_k, layer.to_v)
        if not self.plan.fused_kernels:
            tokens = tokens.to(self._type(layer.to_q))
            return [self._project(one, tokens) for one in layers]
        if layer not in self._joined:
            weight = torch.cat([one.weight for one in layers])
            bias = None if layer.to_q.bias is None else torch.cat([one.bias for one in layers])
            self._joined[layer] = weight, bias
        return F.linear(tokens, *self._joined[layer]).chunk(3, dim=-1)

    def _attend_to_prompt(self, layer: Attention, tokens: Tensor) -> Tensor:
        query = split_heads(self._project(layer.to_q, tokens), layer.heads)
        key, value = (part.to(query.dtype) for part in self._prompt[layer])
        with self._attention_backends(without=SDPBackend.CUDNN_ATTENTION):
            out = F.scaled_dot_product_attention(query, key, value, scale=layer.scale)
        return self._project(layer.to_out[0], merge_heads(out))

    def _scratch_like(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return memory that was used before: a CPU takes longer to get pages than to fill them."""
        scratch = self._scratch.get(dtype)
        if scratch is None or scratch.numel() < x.numel():
            self._scratch[dtype] = scratch = x.new_empty(x.numel(), dtype=dtype)
        batch, channels, height, width = x.shape
        scratch = scratch[: x.numel()].view(batch, height, width, channels)
        return scratch.permute(0, 3, 1, 2)

    def _attention_backends(
        self, without: SDPBackend | None = None
    ) -> AbstractContextManager[object]:
        preferred = [b for b in self.plan.attention_backends if b != without]
        return sdpa_kernel(preferred, set_priority=True) if preferred else nullcontext()

    def _project(self, layer: nn.Linear | nn.Conv2d, tokens: Tensor) -> Tensor:
        tokens = tokens.to(self._type(layer))
        return project(tokens, self._weight(layer, tokens), layer.bias)

    def _type(self, layer: nn.Module) -> torch.dtype:
        """Return the type that a layer multiplies in."""
        is_exact = self.plan.multiplied is None or layer in self._exact
        return layer.weight.dtype if is_exact else self.plan.multiplied

    def _weight(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return a layer's weight in the type of what it is multiplied with."""
        weight = layer.weight
        if weight.dtype == x.dtype:
            return weight
        if weight not in self._lowered:
            self._lowered[weight] = weight.to(x.dtype)
        return self._lowered[weight]

    def _transposed_weight(self, conv: nn.Conv2d, dtype: torch.dtype) -> Tensor:
        if conv not in self._transposed:
            self._transposed[conv] = self.laid_out(transposed_weight(conv.weight)).to(dtype)
        return self._transposed[conv]

    def _settled(self, x: Activation) -> Tensor:
        """Return values with their bias."""
        return x.values if x.bias is None else x.values + x.bias.to(x.values.dtype)[:, None, None]

    def _projected_bias(self, layer: nn.Linear | nn.Conv2d, given: Tensor | None) -> Tensor | None:
        """Return a projection's bias together with one that its input still waits for."""
        if given is None:
            return layer.bias
        if layer not in self._summed_biases:
            total = layer.weight.float().flatten(1) @ given.float()
            self._summed_biases[layer] = total if layer.bias is None else total + layer.bias
        return self._summed_biases[layer]

    def _summed_bias(self, block: ResnetBlock2D, given: Tensor | None) -> Tensor:
        """Return all biases of a block's sum: its last convolution's, and the residual's."""
        if block not in self._summed_biases:
            total = block.conv2.bias.float()
            shortcut = block.conv_shortcut
            if shortcut is not None:
                total = total + (0 if shortcut.bias is None else shortcut.bias.float())
                if given is not None:  # as it goes through a 1×1 convolution
                    total = total + shortcut.weight.float().flatten(1) @ given.float()
            elif given is not None:
                total = total + given.float()
            self._summed_biases[block] = total
        return self._summed_biases[block]


def _sum(x: Tensor, residual: Tensor) -> Tensor:
    """Add a residual, which stays as it is and may be of a wider type."""
    return x.to(torch.promote_types(x.dtype, residual.dtype)).add_(residual)
