"""The noise schedule as pure functions; every tensor argument is broadcast per batch item."""

from __future__ import annotations

import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000
"""Timesteps of the Stable Diffusion schedule; a user's timestep is 0..NUM_TRAIN_TIMESTEPS - 1."""


def make_alphas_cumprod(
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    beta_schedule: str = "scaled_linear",
    num_train_timesteps: int = NUM_TRAIN_TIMESTEPS,
) -> Tensor:
    """Return the cumulative products of 1 - β of a diffusion schedule.

    Args:
        beta_start: First β, in (0, 1).
        beta_end: Last β, in (0, 1), at least `beta_start`.
        beta_schedule: "scaled_linear" (linear in √β, Stable Diffusion's) or "linear".
        num_train_timesteps: Number of timesteps, at least 1.

    Returns:
        ᾱ, (num_train_timesteps,), float32, strictly decreasing in (0, 1).

    Raises:
        ValueError: A β is out of range or the schedule's name is unknown.

    Source: DDPM (arXiv 2006.11239), section 2; scaled_linear from latent diffusion.
    """
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(
            f"betas must satisfy 0 < beta_start <= beta_end < 1, got {beta_start} and {beta_end}; "
            "check the scheduler's configuration"
        )
    if beta_schedule == "scaled_linear":
        steps = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps)
        betas = steps**2
    elif beta_schedule == "linear":
        betas = torch.linspace(beta_start, beta_end, num_train_timesteps)
    else:
        raise ValueError(
            f"beta_schedule must be 'scaled_linear' or 'linear', got {beta_schedule!r}; "
            "other schedules are not those of a TADSR checkpoint"
        )
    return torch.cumprod(1.0 - betas, dim=0)


def add_noise(x0: Tensor, eps: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Diffuse clean latents to a timestep: √ᾱ·x0 + √(1−ᾱ)·ε.

    Args:
        x0: Clean latents, (B, C, H, W), scaled.
        eps: Standard normal noise, shaped as `x0`.
        timesteps: One index into the schedule per item, (B,), int64.
        alphas_cumprod: ᾱ, (T,).

    Returns:
        Noisy latents, shaped as `x0`.

    Source: DDPM (arXiv 2006.11239), equation 4.
    """
    alpha, sigma = _coefficients(timesteps, alphas_cumprod, x0)
    return alpha * x0 + sigma * eps


def eps_to_x0(xt: Tensor, eps: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Recover clean latents from noisy ones and their noise: (x_t − √(1−ᾱ)·ε) / √ᾱ.

    Args:
        xt: Noisy latents, (B, C, H, W), scaled.
        eps: Predicted noise, shaped as `xt`.
        timesteps: One index into the schedule per item, (B,), int64.
        alphas_cumprod: ᾱ, (T,).

    Returns:
        Predicted clean latents, shaped as `xt`.

    Source: DDPM (arXiv 2006.11239), equation 15.
    """
    alpha, sigma = _coefficients(timesteps, alphas_cumprod, xt)
    return (xt - sigma * eps) / alpha


def residual_to_x0(
    latents: Tensor, residual: Tensor, timesteps: Tensor, alphas_cumprod: Tensor
) -> Tensor:
    """Apply the student's one step: z_L / √ᾱ − r.

    Args:
        latents: Latents of the low-quality image, (B, C, H, W), scaled.
        residual: The student UNet's output r (not a noise prediction), shaped as `latents`.
        timesteps: One index into the schedule per item, (B,), int64.
        alphas_cumprod: ᾱ, (T,).

    Returns:
        Latents of the restored image, shaped as `latents`.

    Source: TADSR (arXiv 2508.16557), one-step student.
    """
    alpha, _ = _coefficients(timesteps, alphas_cumprod, latents)
    return subtract_residual(latents, residual, alpha)


def subtract_residual(latents: Tensor, residual: Tensor, alpha: Tensor) -> Tensor:
    """Apply the student's one step where √ᾱ is known already: z_L / √ᾱ − r.

    What is not listed here is as for `residual_to_x0`.

    Args:
        alpha: √ᾱ, (1, 1, 1, 1) or (B, 1, 1, 1).
    """
    return latents / alpha - residual


def latents_of(moments: Tensor, scaling_factor: float, noise: Tensor | None = None) -> Tensor:
    """Take scaled latents from the encoder's posterior: its mean, or a sample.

    Args:
        moments: Mean and log-variance, (B, 2·C, H, W).
        scaling_factor: Of the autoencoder.
        noise: Standard normal, (B, C, H, W); None takes the mean.
    """
    mean, log_variance = moments.chunk(2, dim=1)
    if noise is not None:
        mean = mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise
    return mean * scaling_factor


def _coefficients(timesteps: Tensor, alphas_cumprod: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return √ᾱ and √(1−ᾱ), each (B, 1, 1, 1), taken in float32 and cast to `like`."""
    alpha_bar = alphas_cumprod.to(like.device, torch.float32)[timesteps.to(like.device)]
    alpha_bar = alpha_bar[:, None, None, None]  # [B, 1, 1, 1]
    return alpha_bar.sqrt().to(like.dtype), (1 - alpha_bar).sqrt().to(like.dtype)
