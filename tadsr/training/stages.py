"""The stages that train a small TADSR from scratch: autoencoder, then one-step student."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from tadsr.models.prompt_embeddings import PromptEmbeddings
from tadsr.models.time_aware_vae import TimeAwareAutoencoderKL
from tadsr.schedule import NUM_TRAIN_TIMESTEPS, residual_to_x0
from tadsr.training.config import AutoencoderConfig, StudentConfig
from tadsr.training.loop import TrainingLoop
from tadsr.training.losses import blurred_mse, chroma_mse, mse_per_sample
from tadsr.training.perceptual import PerceptualDistance


def reset_time_layers(vae: TimeAwareAutoencoderKL) -> None:
    """Make every block's scale and shift zero, so that the encoder ignores the timestep."""
    for resnet in vae.encoder.time_conditioned_resnets():
        nn.init.zeros_(resnet.time_emb_proj.weight)
        nn.init.zeros_(resnet.time_emb_proj.bias)


def train_autoencoder(
    vae: TimeAwareAutoencoderKL, config: AutoencoderConfig, perceptual: PerceptualDistance
) -> None:
    """Train encoder and decoder on sharp crops, without time.

    Args:
        vae: The autoencoder, changed in place; its time layers are set to zero and left alone.
        config: The stage.
        perceptual: Distance of images in [-1, 1].

    Raises:
        ValueError: The data folder holds no usable photograph.
        FloatingPointError: The loss is not finite.
    """
    reset_time_layers(vae)
    vae.requires_grad_(True)
    vae.encoder.time_embedding.requires_grad_(False)
    for resnet in vae.encoder.time_conditioned_resnets():
        resnet.time_emb_proj.requires_grad_(False)
    loop = TrainingLoop({"vae": vae}, config.run, config.data, config.optimizer)

    def step_loss(hq: Tensor, _lq: Tensor, _step: int, generator: torch.Generator):
        posterior = vae.encode(hq, 0).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator, device=hq.device)
        pred = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        l1 = (pred - hq).abs().mean()
        distance = perceptual(pred, hq).mean()
        chroma = chroma_mse(pred, hq).mean()
        kl = posterior.kl().float().mean()
        loss = (
            config.l1_weight * l1
            + config.perceptual_weight * distance
            + config.chroma_weight * chroma
            + config.kl_weight * kl
        )
        return {"loss": loss, "l1": l1, "perceptual": distance, "chroma": chroma, "kl": kl}

    loop.train(step_loss)


@torch.no_grad()
def measure_scaling_factor(vae: TimeAwareAutoencoderKL, hq: Tensor) -> float:
    """Return 1 / standard deviation of the latents of images (B, 3, H, W) in [-1, 1]."""
    return 1.0 / vae.encode(hq, 0).latent_dist.mode().float().std().item()


def train_student(
    vae: TimeAwareAutoencoderKL,
    unet: UNet2DConditionModel,
    prompt_embeddings: PromptEmbeddings,
    alphas_cumprod: Tensor,
    config: StudentConfig,
    perceptual: PerceptualDistance,
) -> None:
    """Train the time-aware encoder and the UNet to restore in one step at any timestep.

    Args:
        vae: Autoencoder of the first stage; the encoder is changed in place, the decoder only
            if `config.train_decoder`.
        unet: The student, changed in place.
        prompt_embeddings: Embeddings of the empty prompt, trained along.
        alphas_cumprod: ᾱ, (T,).
        config: The stage.
        perceptual: Distance of images in [-1, 1].

    Raises:
        ValueError: The data folder holds no usable photograph.
        FloatingPointError: The loss is not finite.

    Source: TADSR (arXiv 2508.16557), reconstruction loss; timesteps uniform over the schedule.
    """
    device = config.run.device
    alphas_cumprod = alphas_cumprod.to(device)
    scaling = vae.config.scaling_factor
    # The latents to match in the first steps are those of the encoder before it learns time.
    sharp_encoder = TimeAwareAutoencoderKL.from_config(vae.config).to(device)
    sharp_encoder.load_state_dict(vae.state_dict())
    sharp_encoder.requires_grad_(False).eval()
    unet.requires_grad_(True)
    vae.requires_grad_(False)
    vae.encoder.requires_grad_(True)
    vae.quant_conv.requires_grad_(True)
    if config.train_decoder:
        vae.decoder.requires_grad_(True)
        vae.post_quant_conv.requires_grad_(True)
    loop = TrainingLoop(
        {"vae": vae, "unet": unet, "prompt_embeddings": prompt_embeddings},
        config.run,
        config.data,
        config.optimizer,
    )

    def restore_latents(lq: Tensor, timesteps: Tensor) -> Tensor:
        latents = vae.encode(lq, timesteps).latent_dist.mode().float() * scaling
        prompts = prompt_embeddings([""]).expand(lq.shape[0], -1, -1)
        residual = unet(latents, timesteps, prompts).sample.float()
        return residual_to_x0(latents, residual, timesteps, alphas_cumprod)

    def step_loss(hq: Tensor, lq: Tensor, step: int, generator: torch.Generator):
        timesteps = torch.randint(
            NUM_TRAIN_TIMESTEPS, (hq.shape[0],), generator=generator, device=hq.device
        )
        pred_x0 = restore_latents(lq, timesteps)
        if step < config.latent_steps:
            with torch.no_grad():
                target = sharp_encoder.encode(hq, 0).latent_dist.mode().float() * scaling
            # x0 carries 1/√ᾱ; undone here, or the largest timesteps would be all of the loss.
            error = F.smooth_l1_loss(pred_x0, target, reduction="none").flatten(1).mean(1)
            latent = (error * alphas_cumprod[timesteps].sqrt()).mean()
            return {"loss": latent, "latent": error.mean()}
        pred = vae.decode(pred_x0 / scaling).sample.float()
        mse = mse_per_sample(pred, hq)
        blurred = blurred_mse(pred, hq, timesteps)
        chroma = chroma_mse(pred, hq)
        distance = perceptual(pred, hq)
        loss = (
            config.mse_weight.at(timesteps) * mse
            + config.blurred_mse_weight.at(timesteps) * blurred
            + config.chroma_mse_weight.at(timesteps) * chroma
            + config.perceptual_weight.at(timesteps) * distance
        ).mean()
        return {
            "loss": loss,
            "mse": mse.mean(),
            "blurred_mse": blurred.mean(),
            "chroma_mse": chroma.mean(),
            "perceptual": distance.mean(),
        }

    loop.train(step_loss)
