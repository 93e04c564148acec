"""The three networks of one step as three stages, run in one of three ways.

A stage's result comes with its largest magnitude on its device, which tells whether all of it is
finite; nobody waits for it here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from tadsr.networks.walk import decode, encode, predict
from tadsr.onestep.fold import PromptFolding, fold_encoder_time, fold_unet_time
from tadsr.onestep.fused_layers import FusedLayers
from tadsr.onestep.graphs import GraphCache
from tadsr.onestep.plan import EnginePlan
from tadsr.onestep.products import exact_layers
from tadsr.prompts import Prompts
from tadsr.schedule import residual_to_x0, subtract_residual

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from tadsr.networks.time_aware_vae import TimeAwareAutoencoderKL


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
        self.encoder_time = fold_encoder_time(vae.encoder)
        self.unet_time = fold_unet_time(unet, alphas_cumprod)
        self.prompts = PromptFolding(unet)
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

        lq = lq.to(self.vae.dtype)
        return self._run("encode", stage, lq, (self.encoder_time.of(timesteps),))

    def predict_x0(self, latents: Tensor, timesteps: Sequence[int], prompts: Prompts) -> Checked:
        """Take the student's step on scaled latents (B, C, h, w)."""
        dtype = self.unet.dtype

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
            z = (pred_x0 / self.vae.config.scaling_factor).to(self.vae.dtype)
            return checked(decode(self.layers.at(), self.vae, z))

        return self._run("decode", stage, pred_x0)

    def _run(
        self,
        name: str,
        stage: Callable[..., Checked],
        x: Tensor,
        conditions: tuple[Tensor, ...] = (),
    ) -> Checked:
        factor = 1 if name == "encode" else self.vae.downscale_factor
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
