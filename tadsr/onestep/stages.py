"""The three networks of one step as three stages, run in one of three ways.

A stage's result comes with its largest magnitude on its device, which tells whether all of it is
finite; nobody waits for it here. Timesteps and prompts are folded into small tensors once for each.
All tensors of a network lie in one, so that a recorded graph takes a new timestep or prompt by one
copy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tadsr.caches import RecentlyUsed, is_kind
from tadsr.networks.walk import decode, encode, predict
from tadsr.onestep.fused_layers import FusedLayers, PromptConditions, TimeConditions
from tadsr.onestep.graphs import GraphCache
from tadsr.onestep.operations import split_heads
from tadsr.onestep.plan import EnginePlan
from tadsr.onestep.products import exact_layers
from tadsr.prompts import Prompts
from tadsr.schedule import residual_to_x0, subtract_residual

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from diffusers.models.resnet import ResnetBlock2D

    from tadsr.networks.time_aware_vae import TimeAwareAutoencoderKL, TimeAwareEncoder


MAX_TIMESTEPS = 64
"""Timesteps, or combinations of them in a batch, whose tensors are kept."""
MAX_PROMPTS = 8
"""Prompts, or combinations of them in a batch, whose keys and values are kept."""


class TimeFolding:
    """Precomputes what timesteps add to, or multiply into, each layer.

    Args:
        network: An encoder or a UNet, which embeds timesteps.
        extra: Gives one value more for a timestep.
    """

    def __init__(
        self,
        network: TimeAwareEncoder | UNet2DConditionModel,
        extra: Callable[[int], float] | None = None,
    ) -> None:
        blocks = (module for module in network.modules() if is_kind(module, "ResnetBlock2D"))
        self.resnets = [block for block in blocks if block.time_emb_proj is not None]
        self._time_proj = network.time_proj
        # What is folded is rounded by nobody else, so it is worth float32.
        self._time_embedding = copy.deepcopy(network.time_embedding).float()
        self._extra = extra
        sizes = [
            2 * block.out_channels if _is_modulated(block) else block.out_channels
            for block in self.resnets
        ]
        self._spans = list(pairwise(accumulate(sizes, initial=0)))
        self._rows: dict[tuple[int, ...], Tensor] = RecentlyUsed(MAX_TIMESTEPS)

    def of(self, timesteps: Sequence[int]) -> Tensor:
        """Return the tensors of timesteps in one: (n,) if all are equal, else (B, n)."""
        key = tuple(timesteps[:1]) if len(set(timesteps)) == 1 else tuple(timesteps)
        if key not in self._rows:
            if len(key) == 1:
                self._rows[key] = self._fold(key[0])
            else:
                self._rows[key] = torch.stack([self.of([timestep]) for timestep in key])
        return self._rows[key]

    def split(self, flat: Tensor) -> tuple[TimeConditions, Tensor]:
        """Return what each block reads of `of`'s result, and the extra values."""
        conditions = {}
        for block, (start, stop) in zip(self.resnets, self._spans, strict=True):
            part = flat[..., start:stop]
            conditions[block] = part.chunk(2, dim=-1) if _is_modulated(block) else (part,)
        return conditions, flat[..., self._spans[-1][1] if self._spans else 0 :]

    def _fold(self, timestep: int) -> Tensor:
        device = next(self._time_embedding.parameters()).device
        timesteps = torch.tensor([timestep], device=device)
        temb = self._time_embedding(self._time_proj(timesteps).float())
        parts = []
        for block in self.resnets:
            projection = block.time_emb_proj
            active = temb if block.skip_time_act else block.nonlinearity(temb)
            time = F.linear(active, projection.weight.float(), projection.bias.float())[0]
            if _is_modulated(block):
                # (γ·n + β)·(1 + scale) + shift = γ(1 + scale)·n + (β(1 + scale) + shift)
                scale, shift = time.chunk(2)
                weight, bias = block.norm2.weight.float(), block.norm2.bias.float()
                parts += [weight * (1 + scale), bias * (1 + scale) + shift]
            else:
                parts.append(block.conv1.bias.float() + time)
        if self._extra is not None:
            parts.append(torch.tensor([self._extra(timestep)], device=device))
        return torch.cat(parts)


class PromptFolding:
    """Precomputes the prompts' keys and values of every cross-attention."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self._dtype = unet.dtype
        self._attentions = [
            module
            for module in unet.modules()
            if is_kind(module, "Attention") and module.is_cross_attention
        ]
        self._entries: dict[tuple[Hashable, ...], Tensor] = RecentlyUsed(MAX_PROMPTS)
        # Cache of the last tensor's result, keyed by identity, for embeddings without keys.
        self._last: tuple[Tensor, int, Tensor] | None = None

    def of(self, prompts: Prompts) -> Tensor:
        """Return keys and values of prompts in one: (1, n) for one prompt, or (B, n)."""
        if prompts.keys is None:
            return self._of_tensor(prompts.embeds)
        is_one = len(set(prompts.keys)) == 1
        key = prompts.keys[:1] if is_one else prompts.keys
        if key not in self._entries:
            self._entries[key] = self._fold(prompts.embeds[:1] if is_one else prompts.embeds)
        return self._entries[key]

    def _of_tensor(self, embeds: Tensor) -> Tensor:
        is_one = embeds.shape[0] > 1 and embeds.stride(0) == 0
        if embeds.is_inference():  # counts no versions
            return self._fold(embeds[:1] if is_one else embeds)
        last = self._last
        if last is None or last[0] is not embeds or last[1] != embeds._version:
            flat = self._fold(embeds[:1] if is_one else embeds)
            self._last = last = embeds, embeds._version, flat
        return last[2]

    def _fold(self, embeds: Tensor) -> Tensor:
        embeds = embeds.to(self._dtype)
        parts = [
            split_heads(projection(embeds), layer.heads).flatten(1)
            for layer in self._attentions
            for projection in (layer.to_k, layer.to_v)
        ]
        return torch.cat(parts, dim=1) if parts else embeds.new_empty(1, 0)

    def split(self, flat: Tensor, batch: int) -> PromptConditions:
        """Return what each attention reads of `of`'s result."""
        conditions, start = {}, 0
        width = 2 * sum(layer.inner_dim for layer in self._attentions)
        for layer in self._attentions:
            # [B, heads, L, C / heads]; the prompt's length follows from the whole.
            size = layer.inner_dim * (flat.shape[1] // width)
            key, value = (
                flat[:, first : first + size]
                .unflatten(1, (layer.heads, -1, layer.inner_dim // layer.heads))
                .expand(batch, -1, -1, -1)
                for first in (start, start + size)
            )
            conditions[layer] = (key, value)
            start += 2 * size
        return conditions


def _is_modulated(block: ResnetBlock2D) -> bool:
    return block.time_embedding_norm == "scale_shift"


class Checked(NamedTuple):
    """A stage's result."""

    values: Tensor
    largest: Tensor
    """Largest magnitude, (), at least float32; not below infinity unless all are finite."""


def checked(values: Tensor) -> Checked:
    """Measure a result without waiting for it."""
    # One kernel and one pass over the memory: the largest is NaN where one value is.
    wide = torch.promote_types(values.dtype, torch.float32)
    largest = torch.linalg.vector_norm(values, torch.inf, dtype=wide)
    return Checked(values, largest)


class AnyStages(Protocol):
    """The three networks; each result comes with a flag that tells whether it is finite."""

    checks_each: bool
    """Whether a result is checked before the next network runs, and not only at the end."""

    def encode(self, lq: Any, timesteps: Sequence[int]) -> Checked:
        """Encode LQ images at their timesteps to the posterior's moments."""

    def predict_x0(self, latents: Tensor, timesteps: Sequence[int], prompts: Prompts) -> Checked:
        """Take the student's step on scaled latents (B, C, h, w)."""

    def decode(self, pred_x0: Tensor) -> Checked:
        """Decode scaled latents to images."""

    def of(self, vae: TimeAwareAutoencoderKL, unet: UNet2DConditionModel) -> AnyStages:
        """Return the way to run other networks, in wider types, after an overflow."""


class EagerStages:
    """Diffusers' modules as they are."""

    checks_each = False

    def __init__(
        self, vae: TimeAwareAutoencoderKL, unet: UNet2DConditionModel, alphas_cumprod: Tensor
    ) -> None:
        self.vae = vae
        self.unet = self._unet = unet
        self.alphas_cumprod = alphas_cumprod

    def of(self, vae: TimeAwareAutoencoderKL, unet: UNet2DConditionModel) -> EagerStages:
        """Return plain stages of other networks."""
        return EagerStages(vae, unet, self.alphas_cumprod)

    def encode(self, lq: Tensor, timesteps: Sequence[int]) -> Checked:
        """Encode LQ images (B, 3, H, W) in [-1, 1] to the posterior's moments."""
        timesteps = torch.tensor(timesteps, device=lq.device)
        return checked(self.vae.encode(lq.to(self.vae.dtype), timesteps).latent_dist.parameters)

    def predict_x0(self, latents: Tensor, timesteps: Sequence[int], prompts: Prompts) -> Checked:
        """Take the student's step on scaled latents (B, C, h, w)."""
        timesteps = torch.tensor(timesteps, device=latents.device)
        latents, embeds = (x.to(self.unet.dtype) for x in (latents, prompts.embeds))
        (residual,) = self._unet(latents, timesteps, embeds, return_dict=False)
        return checked(residual_to_x0(latents, residual, timesteps, self.alphas_cumprod))

    def decode(self, pred_x0: Tensor) -> Checked:
        """Decode scaled latents to images (B, 3, H, W), not clamped."""
        z = pred_x0.to(self.vae.dtype) / self.vae.config.scaling_factor
        return checked(self.vae.decode(z).sample)


class CompiledStages(EagerStages):
    """The same modules through torch.compile, recompiled for every new shape."""

    def __init__(
        self, vae: TimeAwareAutoencoderKL, unet: UNet2DConditionModel, alphas_cumprod: Tensor
    ) -> None:
        super().__init__(vae, unet, alphas_cumprod)
        self._encoder = _compiled(vae.encoder)
        self._unet = _compiled(unet)
        self._decoder = _compiled(vae.decoder)

    def encode(self, lq: Tensor, timesteps: Sequence[int]) -> Checked:
        """Encode LQ images (B, 3, H, W) in [-1, 1] to the posterior's moments."""
        timesteps = torch.tensor(timesteps, device=lq.device)
        return checked(self.vae.quant_conv(self._encoder(lq.to(self.vae.dtype), timesteps)))

    def decode(self, pred_x0: Tensor) -> Checked:
        """Decode scaled latents to images (B, 3, H, W), not clamped."""
        z = pred_x0.to(self.vae.dtype) / self.vae.config.scaling_factor
        return checked(self._decoder(self.vae.post_quant_conv(z)))


class FusedStages:
    """The same weights through the engine's own layers."""

    checks_each = False

    def __init__(
        self,
        vae: TimeAwareAutoencoderKL,
        unet: UNet2DConditionModel,
        alphas_cumprod: Tensor,
        plan: EnginePlan,
    ) -> None:
        self.vae = vae
        self.unet = unet
        self.alphas_cumprod = alphas_cumprod
        self.plan = plan
        self.layers = FusedLayers(plan, exact_layers(vae, unet))
        self._factor = vae.downscale_factor
        self.encoder_time = TimeFolding(vae.encoder)
        # Beside what the layers read, √ᾱ.
        self.unet_time = TimeFolding(unet, alphas_cumprod.double().sqrt().tolist().__getitem__)
        self.prompts = PromptFolding(unet)
        self._dtypes = vae.dtype, unet.dtype  # for which diffusers walks through all modules
        self.graphs = None
        if plan.graphs:
            self.graphs = GraphCache(plan.max_graphs, plan.record_after)

    def of(self, vae: TimeAwareAutoencoderKL, unet: UNet2DConditionModel) -> EagerStages:
        """Return plain stages of other networks."""
        return EagerStages(vae, unet, self.alphas_cumprod)

    def encode(self, lq: Tensor, timesteps: Sequence[int]) -> Checked:
        """Encode LQ images (B, 3, H, W) in [-1, 1] to the posterior's moments."""

        def stage(lq: Tensor, flat: Tensor) -> Checked:
            time, _ = self.encoder_time.split(flat)
            return checked(encode(self.layers.at(time), self.vae, lq))

        lq = lq.to(self._dtypes[0])
        return self._run("encode", stage, lq, (self.encoder_time.of(timesteps),))

    def predict_x0(self, latents: Tensor, timesteps: Sequence[int], prompts: Prompts) -> Checked:
        """Take the student's step on scaled latents (B, C, h, w)."""
        dtype = self._dtypes[1]

        def stage(latents: Tensor, flat_time: Tensor, flat_prompt: Tensor) -> Checked:
            time, alpha = self.unet_time.split(flat_time)
            prompt = self.prompts.split(flat_prompt, latents.shape[0])
            residual = predict(self.layers.at(time, prompt), self.unet, latents.to(dtype))
            alpha = alpha.view(-1, 1, 1, 1)
            return checked(subtract_residual(latents, residual, alpha))

        conditions = (self.unet_time.of(timesteps), self.prompts.of(prompts))
        return self._run("predict_x0", stage, latents, conditions)

    def decode(self, pred_x0: Tensor) -> Checked:
        """Decode scaled latents to images (B, 3, H, W), not clamped."""

        def stage(pred_x0: Tensor) -> Checked:
            z = (pred_x0 / self.vae.config.scaling_factor).to(self._dtypes[0])
            return checked(decode(self.layers.at(), self.vae, z))

        return self._run("decode", stage, pred_x0)

    def _run(
        self,
        name: str,
        stage: Callable[..., Checked],
        x: Tensor,
        conditions: tuple[Tensor, ...] = (),
    ) -> Checked:
        factor = 1 if name == "encode" else self._factor
        pixels = x.shape[0] * x.shape[2] * x.shape[3] * factor**2
        # Streams, events and graphs are those of the current device.
        with torch.cuda.device(x.device if x.device.type == "cuda" else -1):
            if self.graphs is None or pixels > self.plan.max_graphed_pixels:
                return stage(x, *conditions)
            return Checked(*self.graphs.run(name, stage, (x,), conditions))


def _compiled(module: nn.Module) -> nn.Module:
    if next(module.parameters()).device.type != "cuda":
        return torch.compile(module, dynamic=False)
    # As mode="max-autotune-no-cudagraphs", which leaves graphs to TORCHINDUCTOR_CUDAGRAPHS: they
    # belong to the thread that recorded them, and fail in any other.
    tuning = {"max_autotune": True, "coordinate_descent_tuning": True}
    return torch.compile(module, options={**tuning, "triton.cudagraphs": False}, dynamic=False)
