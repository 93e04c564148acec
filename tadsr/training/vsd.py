"""Variational score distillation with a timestep that follows the student's, as pure functions."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tadsr.schedule import add_noise, eps_to_x0

PredictNoise = Callable[[Tensor, Tensor], Tensor]
"""(noisy latents (B, C, h, w), timesteps (B,)) -> predicted noise, shaped as the latents."""

_SMALLEST_WEIGHT = 1e-6
"""Keeps the division finite where student and teacher agree to the last bit."""


def link_timesteps(
    timesteps: Tensor, factor: float = 0.5, offset: float = 0.0, *, last: int = 999
) -> Tensor:
    """Return the teacher's timesteps for the student's: ⌊λ·t_s + γ⌋.

    Args:
        timesteps: The student's t_s, (B,), int64.
        factor: λ.
        offset: γ, in timesteps.
        last: Largest timestep; the result is clipped to 0..last.

    Returns:
        t_v, (B,), int64.

    Source: TADSR (arXiv 2508.16557), time-aware variational score distillation.
    """
    return (factor * timesteps.double() + offset).floor().clamp(0, last).long()


def guidance_scale(timesteps: Tensor, base: float = 7.5, slope: float = 1 / 200) -> Tensor:
    """Return the teacher's guidance g = base + slope·t_v of each item, (B,), float32."""
    return base + slope * timesteps.float()


def guided_noise(
    predict: PredictNoise, predict_negative: PredictNoise, guidance: Tensor
) -> PredictNoise:
    """Combine two conditions by classifier-free guidance: ε_neg + g·(ε_prompt − ε_neg).

    Args:
        predict: Noise under the prompt.
        predict_negative: Noise under the negative prompt.
        guidance: g of each item, (B,); 1 is no guidance.

    Returns:
        The guided prediction.

    Source: Classifier-free guidance (arXiv 2207.12598), equation 6.
    """

    def predict_guided(noisy: Tensor, timesteps: Tensor) -> Tensor:
        negative = predict_negative(noisy, timesteps)
        scale = guidance.to(negative.device, negative.dtype)[:, None, None, None]
        return negative + scale * (predict(noisy, timesteps) - negative)

    return predict_guided


def vsd_loss(
    pred_x0: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    alphas_cumprod: Tensor,
    teacher: PredictNoise,
    fake_score: PredictNoise,
) -> Tensor:
    """Return a loss whose gradient moves the student's latents from fake to teacher.

    Both models denoise the same noisy latents; the difference of their x0, divided by the mean
    distance of the student from the teacher, is the direction. Neither model gets a gradient.

    Args:
        pred_x0: The student's latents ẑ, (B, C, h, w), scaled.
        noise: Standard normal noise, shaped as `pred_x0`.
        timesteps: t_v of each item, (B,), int64; see `link_timesteps`.
        alphas_cumprod: ᾱ, (T,).
        teacher: The teacher's noise, with its guidance; see `guided_noise`.
        fake_score: The fake-score model's noise.

    Returns:
        (B,), float32: the mean squared direction of each item.

    Source: TADSR (arXiv 2508.16557), TAVSD; ProlificDreamer (arXiv 2305.16213), VSD.
    """
    with torch.no_grad():
        latents = pred_x0.detach().float()
        noisy = add_noise(latents, noise.float(), timesteps, alphas_cumprod)
        fake = eps_to_x0(noisy, fake_score(noisy, timesteps).float(), timesteps, alphas_cumprod)
        real = eps_to_x0(noisy, teacher(noisy, timesteps).float(), timesteps, alphas_cumprod)
        distance = (latents - real).abs().mean((1, 2, 3), keepdim=True)  # [B, 1, 1, 1]
        target = latents - (fake - real) / distance.clamp_min(_SMALLEST_WEIGHT)
    return (pred_x0.float() - target).square().flatten(1).mean(1)


def diffusion_loss(
    predict: PredictNoise, latents: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor
) -> Tensor:
    """Return the noise-prediction error of a diffusion model on some latents.

    Trains the fake-score model on the student's results, and a teacher on photographs.

    Args:
        predict: The model's noise.
        latents: Clean latents, (B, C, h, w), scaled; they get no gradient.
        noise: Standard normal noise, shaped as `latents`.
        timesteps: One timestep per item, (B,), int64.
        alphas_cumprod: ᾱ, (T,).

    Returns:
        (B,), float32.

    Source: DDPM (arXiv 2006.11239), equation 14.
    """
    noisy = add_noise(latents.detach().float(), noise.float(), timesteps, alphas_cumprod)
    predicted = predict(noisy, timesteps).float()
    return F.mse_loss(predicted, noise.float(), reduction="none").flatten(1).mean(1)
