"""The one-step student as one module, so that gradients of all its parts travel together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from tadsr.checkpoints.base import make_trainable
from tadsr.checkpoints.checkpoint import Checkpoint
from tadsr.networks.adapters import adapter_parameters, has_adapters
from tadsr.networks.prompt_embeddings import PromptEmbeddings
from tadsr.networks.time_aware_vae import TimeAwareAutoencoderKL, neutralize_time_layers
from tadsr.schedule import latents_of, residual_to_x0
from tadsr.training.stages.stage_config import DistillationConfig


class Restored(NamedTuple):
    """What the student makes of LQ images."""

    pred_x0: Tensor
    """Scaled latents, (B, C, h, w), float32."""
    image: Tensor | None
    """Images (B, 3, H, W), about [-1, 1], float32, not clamped; None if not asked for."""


class OneStepStudent(nn.Module):
    """Encode at a timestep, take one step of the UNet, decode.

    Args:
        prompt_embeddings: Embeddings trained along; None where embeddings are given as tensors.

    Source: TADSR (arXiv 2508.16557), one-step inference.
    """

    def __init__(
        self,
        vae: TimeAwareAutoencoderKL,
        unet: UNet2DConditionModel,
        prompt_embeddings: PromptEmbeddings | None,
        alphas_cumprod: Tensor,
    ) -> None:
        super().__init__()
        self.vae = vae
        self.unet = unet
        self.prompt_embeddings = prompt_embeddings
        self.register_buffer("alphas_cumprod", alphas_cumprod, persistent=False)

    def forward(
        self,
        lq: Tensor,
        timesteps: Tensor,
        prompts: Tensor | Sequence[str],
        *,
        posterior_noise: Tensor | None = None,
        decode: bool = True,
    ) -> Restored:
        """Restore LQ images.

        Args:
            lq: LQ images at output resolution, (B, 3, H, W), in [-1, 1].
            timesteps: t_s of each image, (B,), int64.
            prompts: Prompt embeddings (B, L, D), or B prompts where the student embeds them.
            posterior_noise: Standard normal noise, shaped as the latents, to sample the encoder's
                posterior with; None takes its mean, as inference does.
        """
        scaling = self.vae.config.scaling_factor
        moments = self.vae.encode(lq, timesteps).latent_dist.parameters.float()
        latents = latents_of(moments, scaling, posterior_noise)
        if self.prompt_embeddings is not None and not isinstance(prompts, Tensor):
            prompts = self.prompt_embeddings(list(prompts))
        residual = self.unet(latents, timesteps, prompts).sample.float()
        pred_x0 = residual_to_x0(latents, residual, timesteps, self.alphas_cumprod)
        image = self.vae.decode(pred_x0 / scaling).sample.float() if decode else None
        return Restored(pred_x0, image)


def make_student(
    checkpoint: Checkpoint, config: DistillationConfig, alphas_cumprod: Tensor, seed: int
) -> OneStepStudent:
    """Build the student of a run and mark what is trained."""
    vae, unet = checkpoint.vae, checkpoint.unet
    prompt_embeddings = checkpoint.prompt_embeddings if checkpoint.text_encoder is None else None
    student = OneStepStudent(vae, unet, prompt_embeddings, alphas_cumprod)
    student.requires_grad_(False)
    if not config.tae:
        neutralize_time_layers(vae)
    if config.adapter_rank == 0:
        if has_adapters(unet):
            raise ValueError(
                "adapter_rank must be above 0 for a checkpoint with adapters kept apart, got 0; "
                "convert it to merged weights with `tadsr convert` to train all of them"
            )
        trained = [unet, vae.encoder, vae.quant_conv]
        if prompt_embeddings is not None:
            trained.append(prompt_embeddings)
    else:
        _check_or_attach(checkpoint, config, seed)
        trained = [p for model in (unet, vae) for p in adapter_parameters(model).values()]
    if config.train_decoder:
        trained += [vae.decoder, vae.post_quant_conv]
    for part in trained:
        part.requires_grad_(True)
    if not config.tae:
        for name, parameter in vae.encoder.named_parameters():
            if "time_emb" in name:
                parameter.requires_grad_(False)
    return student


def _check_or_attach(checkpoint: Checkpoint, config: DistillationConfig, seed: int) -> None:
    adapters = checkpoint.adapters
    if adapters is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            make_trainable(checkpoint, config.adapter_rank, config.adapter_alpha)
        return
    theirs = (adapters.rank_unet, adapters.rank_vae)
    rank, alpha = config.adapter_rank, config.adapter_alpha
    if (rank is not None and theirs != (rank, rank)) or alpha not in (None, adapters.alpha):
        raise ValueError(
            f"adapter_rank and adapter_alpha must be those of the checkpoint's adapters, {theirs} "
            f"and {adapters.alpha}, got {rank} and {alpha}; leave them out to take those"
        )
