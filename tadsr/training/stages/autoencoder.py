"""First stage of a small model: an autoencoder of sharp photographs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from tadsr.checkpoints.checkpoint import Checkpoint
from tadsr.measure.perceptual import PerceptualDistance, make_perceptual
from tadsr.networks.time_aware_vae import TimeAwareAutoencoderKL, neutralize_time_layers
from tadsr.training.data import Batch
from tadsr.training.losses import chroma_mse
from tadsr.training.randomness import SampleRandomness
from tadsr.training.stages.stage import Phase, Stage, TrainedNetwork
from tadsr.training.stages.stage_config import AutoencoderConfig, OptimizerConfig

SCALING_CROPS = 64
"""Crops that the latents' variance is measured on."""


class _Autoencoder(nn.Module):
    """Encode, sample and decode in one module, as distributed training needs it."""

    def __init__(self, vae: TimeAwareAutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, hq: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return reconstructions (B, 3, H, W) and the posterior's KL divergence (B,)."""
        posterior = self.vae.encode(hq, 0).latent_dist
        z = posterior.mean + posterior.std * noise
        return self.vae.decode(z).sample.float(), posterior.kl().float()


class AutoencoderStage(Stage):
    """Train encoder and decoder on sharp crops; the encoder's time layers do nothing."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: AutoencoderConfig,
        optimizer: OptimizerConfig,
        perceptual: PerceptualDistance | None = None,
    ) -> None:
        super().__init__(checkpoint)
        self.config = config
        vae = checkpoint.vae
        neutralize_time_layers(vae)
        for name, parameter in vae.named_parameters():
            is_decoders = name.startswith(("decoder.", "post_quant_conv."))
            is_trained = config.train_decoder or not is_decoders
            parameter.requires_grad_(is_trained and "time_emb" not in name)
        self.networks = {"autoencoder": TrainedNetwork(_Autoencoder(vae), optimizer)}
        self.perceptual = perceptual
        if perceptual is None and config.perceptual_weight > 0:
            self.perceptual = make_perceptual(config.perceptual)

    def frozen(self) -> list[nn.Module]:
        """Return the perceptual network."""
        return [self.perceptual] if isinstance(self.perceptual, nn.Module) else []

    def phases(self, batch: Batch, step: int, randomness: SampleRandomness) -> Iterator[Phase]:
        """Yield the autoencoder's losses."""
        config, hq = self.config, batch.hq
        vae = self.checkpoint.vae
        side = hq.shape[-1] // vae.downscale_factor
        noise = randomness.normal("posterior noise", (vae.config.latent_channels, side, side))
        pred, kl = self.runtime.models["autoencoder"](hq, noise)
        losses = {"l1": (pred - hq).abs().mean(), "kl": kl.mean()}
        losses["chroma"] = chroma_mse(pred, hq).mean()
        loss = (
            config.l1_weight * losses["l1"]
            + config.kl_weight * losses["kl"]
            + config.chroma_weight * losses["chroma"]
        )
        if config.perceptual_weight > 0:
            losses["perceptual"] = self.perceptual_distance(pred, hq).mean()
            loss = loss + config.perceptual_weight * losses["perceptual"]
        yield Phase("autoencoder", {"loss": loss, **losses})

    @torch.no_grad()
    def preview(self, hq: Tensor, lq: Tensor, timesteps: tuple[int, ...]) -> dict[str, Tensor]:
        """Return the reconstruction of the original; time plays no part."""
        with self.runtime.autocast():
            return {"reconstruction": self.checkpoint.vae(hq, 0).float()}

    def finish(self, batches: Iterator[Batch]) -> None:
        """Set the factor that gives latents unit variance, unless the decoder is a student's."""
        if not self.config.train_decoder:
            return
        crops: list[Tensor] = []
        while sum(map(len, crops)) < SCALING_CROPS:
            crops.append(next(batches).hq.to(self.runtime.device))
        with self.runtime.autocast():
            factor = measure_scaling_factor(self.checkpoint.vae.eval(), crops)
        self.checkpoint.vae.register_to_config(scaling_factor=factor)


@torch.no_grad()
def measure_scaling_factor(vae: TimeAwareAutoencoderKL, batches: Iterable[Tensor]) -> float:
    """Return 1 / standard deviation of the latents of images (B, 3, H, W) in [-1, 1]."""
    latents = [vae.encode(hq, 0).latent_dist.mode().float() for hq in batches]
    return 1.0 / torch.cat(latents).std().item()
