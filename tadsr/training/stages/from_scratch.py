"""What a small model needs before distillation: an autoencoder, and a teacher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from tadsr.checkpoints.checkpoint import Checkpoint
from tadsr.measure.perceptual import PerceptualDistance
from tadsr.networks.prompt_embeddings import PromptEmbeddings
from tadsr.networks.time_aware_vae import TimeAwareAutoencoderKL, neutralize_time_layers
from tadsr.schedule import add_noise, eps_to_x0
from tadsr.training.data import Batch
from tadsr.training.losses import chroma_mse
from tadsr.training.prompts import PromptEncoder
from tadsr.training.randomness import SampleRandomness
from tadsr.training.stages.stage import Phase, Runtime, Stage, TrainedNetwork
from tadsr.training.stages.stage_config import AutoencoderConfig, OptimizerConfig, TeacherConfig
from tadsr.training.vsd import diffusion_loss

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
        if config.perceptual_weight > 0:
            losses["perceptual"] = self.perceptual_distance(pred, hq).mean()
        loss = sum(getattr(config, f"{name}_weight") * value for name, value in losses.items())
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
        vae = self.checkpoint.vae.eval()
        latents: list[Tensor] = []
        with torch.no_grad(), self.runtime.autocast():
            while sum(map(len, latents)) < SCALING_CROPS:
                hq = next(batches).hq.to(self.runtime.device)
                latents.append(vae.encode(hq, 0).latent_dist.mode().float())
        vae.register_to_config(scaling_factor=1 / torch.cat(latents).std().item())


class _ConditionedUNet(nn.Module):
    """UNet and prompt embeddings in one module, as distributed training needs it."""

    def __init__(self, unet: UNet2DConditionModel, embeddings: PromptEmbeddings | None) -> None:
        super().__init__()
        self.unet = unet
        self.prompt_embeddings = embeddings

    def forward(self, noisy: Tensor, timesteps: Tensor, prompts: Tensor | Sequence[str]) -> Tensor:
        """Predict the noise in latents under prompts."""
        if self.prompt_embeddings is not None:
            prompts = self.prompt_embeddings(list(prompts))
        return self.unet(noisy, timesteps, prompts).sample


class TeacherStage(Stage):
    """Train the UNet to predict noise in latents of photographs, sharp and degraded.

    Source: Latent diffusion (arXiv 2112.10752); DDPM (arXiv 2006.11239), equation 14.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: TeacherConfig,
        optimizer: OptimizerConfig,
        prompts: PromptEncoder,
    ) -> None:
        super().__init__(checkpoint)
        self.config = config
        self.prompts = prompts
        embeddings = None if checkpoint.text_encoder is not None else checkpoint.prompt_embeddings
        network = _ConditionedUNet(checkpoint.unet, embeddings).requires_grad_(True)
        checkpoint.vae.requires_grad_(False)
        self.networks = {"teacher": TrainedNetwork(network, optimizer)}

    def frozen(self) -> list[nn.Module]:
        """Return the autoencoder."""
        return [self.checkpoint.vae]

    def start(self, runtime: Runtime) -> None:
        """Take the device and precision to compute with."""
        super().start(runtime)
        self.prompts.start(runtime.device)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise ValueError unless samples' prompts and the degraded one can be embedded."""
        degraded = [self.config.degraded_prompt] if self.config.degraded_probability else []
        self.prompts.check([*prompts, *degraded])

    def phases(self, batch: Batch, step: int, randomness: SampleRandomness) -> Iterator[Phase]:
        """Yield the teacher's loss."""
        is_degraded = randomness.chances("condition", self.config.degraded_probability)
        pairs = zip(is_degraded, batch.lq, batch.hq, strict=True)
        images = torch.stack([lq if degraded else hq for degraded, lq, hq in pairs])
        texts = [
            self.config.degraded_prompt if degraded else prompt
            for degraded, prompt in zip(is_degraded, batch.prompts, strict=True)
        ]
        vae = self.checkpoint.vae
        with torch.no_grad(), self.runtime.autocast():
            latents = vae.encode(images, 0).latent_dist.mode().float() * vae.config.scaling_factor
        last = len(self.alphas_cumprod) - 1
        timesteps = randomness.integers("diffusion timestep", 0, last)
        noise = randomness.normal("diffusion noise", tuple(latents.shape[1:]))
        has_text = self.checkpoint.text_encoder is not None
        prompts = self.prompts(texts) if has_text else texts
        network = self.runtime.models["teacher"]

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            return network(noisy, timesteps, prompts)

        loss = diffusion_loss(predict, latents, noise, timesteps, self.alphas_cumprod).mean()
        yield Phase("teacher", {"loss": loss})

    @torch.no_grad()
    def preview(self, hq: Tensor, lq: Tensor, timesteps: tuple[int, ...]) -> dict[str, Tensor]:
        """Return the original as recovered in one step from noise of each timestep."""
        vae, unet = self.checkpoint.vae, self.checkpoint.unet
        scaling = vae.config.scaling_factor
        embeds = self.prompts([self.preview_prompt])
        images = {}
        with self.runtime.autocast():
            latents = vae.encode(hq, 0).latent_dist.mode().float() * scaling
            noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
            noise = noise.to(latents)
            for timestep in timesteps:
                t = torch.tensor([timestep], device=latents.device)
                noisy = add_noise(latents, noise, t, self.alphas_cumprod)
                predicted = unet(noisy, t, embeds).sample.float()
                pred_x0 = eps_to_x0(noisy, predicted, t, self.alphas_cumprod)
                images[f"noise {timestep}"] = vae.decode(pred_x0 / scaling).sample.float()
        return images
