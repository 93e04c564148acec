"""TADSR's own stage: distil a teacher into a student of one step."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from tadsr.checkpoints.checkpoint import Checkpoint
from tadsr.measure.perceptual import PerceptualDistance
from tadsr.networks.adapter_targets import DEFAULT_ALPHA, DEFAULT_RANK
from tadsr.networks.adapters import attach_new_adapters, plain_state_dict
from tadsr.networks.time_aware_vae import TimeAwareAutoencoderKL, neutralize_time_layers
from tadsr.training.data import Batch
from tadsr.training.losses import (
    PatchDiscriminator,
    blurred_mse,
    chroma_mse,
    discriminator_loss,
    generator_loss,
    gradient_l1,
    l1_per_sample,
    mse_per_sample,
)
from tadsr.training.prompts import PromptEncoder
from tadsr.training.randomness import SampleRandomness
from tadsr.training.stages.stage import Phase, Runtime, Stage, TrainedNetwork
from tadsr.training.stages.stage_config import DistillationConfig, OptimizerConfig, TimestepRamp
from tadsr.training.student import make_student
from tadsr.training.vsd import (
    diffusion_loss,
    guidance_scale,
    guided_noise,
    link_timesteps,
    vsd_loss,
)

_PIXEL_ERRORS = {
    "plain_mse": mse_per_sample,
    "chroma_mse": chroma_mse,
    "l1": l1_per_sample,
    "gradient": gradient_l1,
}
"""Losses of images alone; each has a weight in the configuration."""


class DistillationStage(Stage):
    """Train the student against photographs and a teacher, and a fake-score model on the student.

    Args:
        teacher: The teacher's parts; its UNet also carries the fake-score model. None trains
            without distillation.

    Source: TADSR (arXiv 2508.16557), training.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        teacher: Checkpoint | None,
        config: DistillationConfig,
        optimizer: OptimizerConfig,
        prompts: PromptEncoder,
        teacher_prompts: PromptEncoder | None = None,
        seed: int = 0,
        perceptual: PerceptualDistance | None = None,
    ) -> None:
        super().__init__(checkpoint)
        self.config = config
        self.prompts = prompts
        self.teacher_prompts = teacher_prompts
        self.sharp_encoder = None
        if config.latent_steps > 0:
            # The latents to match are those of the encoder before it learns time.
            self.sharp_encoder = TimeAwareAutoencoderKL.from_config(checkpoint.vae.config)
            self.sharp_encoder.load_state_dict(plain_state_dict(checkpoint.vae))
            neutralize_time_layers(self.sharp_encoder)
            self.sharp_encoder.decoder = nn.Identity()
            self.sharp_encoder.requires_grad_(False).eval()
        self.student = make_student(checkpoint, config, self.alphas_cumprod, seed)
        self.networks = {"student": TrainedNetwork(self.student, optimizer)}
        self.teacher: UNet2DConditionModel | None = None
        if not config.tavsd_weight.is_zero:
            self._add_teacher(teacher, seed)
        if not config.gan_weight.is_zero:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                discriminator = PatchDiscriminator()
            self.networks["discriminator"] = TrainedNetwork(
                discriminator, config.discriminator_optimizer
            )
        self.perceptual = perceptual

    def _add_teacher(self, teacher: Checkpoint | None, seed: int) -> None:
        if teacher is None or self.teacher_prompts is None:
            raise ValueError("tavsd_weight must be 0 without a teacher; name one (stage.teacher)")
        theirs, ours = _describe_latents(teacher), _describe_latents(self.checkpoint)
        if theirs != ours:
            raise ValueError(
                "teacher and student must share their latents (channels, px per latent, scaling "
                f"factor), got {theirs} and {ours}; train both on one autoencoder"
            )
        self.teacher = teacher.unet.requires_grad_(False)
        if self.config.fake_score_rank > 0:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed + 1)
                rank, alpha = self.config.fake_score_rank, self.config.fake_score_alpha
                alpha = rank * DEFAULT_ALPHA / DEFAULT_RANK if alpha is None else alpha
                attach_new_adapters(self.teacher, None, rank=rank, alpha=alpha)
            fake_score = self.teacher
        else:
            fake_score = copy.deepcopy(self.teacher).requires_grad_(True)
        self.networks["fake_score"] = TrainedNetwork(fake_score, self.config.fake_score_optimizer)

    def frozen(self) -> list[nn.Module]:
        """Return the perceptual network, the first encoder and a teacher of its own weights."""
        further = [self.perceptual, self.sharp_encoder]
        if self.config.fake_score_rank == 0:
            further.append(self.teacher)
        return [module for module in further if isinstance(module, nn.Module)]

    def start(self, runtime: Runtime) -> None:
        """Take the device and precision to compute with."""
        super().start(runtime)
        self.prompts.start(runtime.device)
        if self.teacher_prompts is not None:
            self.teacher_prompts.start(runtime.device)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise ValueError unless student and teacher can embed the prompts they will get."""
        self.prompts.check(prompts)
        if self.teacher is not None:
            config = self.config
            own = prompts if config.teacher_prompt is None else [config.teacher_prompt]
            self.teacher_prompts.check([*own, config.negative_prompt])

    def phases(self, batch: Batch, step: int, randomness: SampleRandomness) -> Iterator[Phase]:
        """Yield the student's losses, then the fake score's, then the discriminator's."""
        timesteps = self._student_timesteps(randomness)
        student = self.runtime.models["student"]
        has_own_prompts = self.student.prompt_embeddings is not None
        prompts = batch.prompts if has_own_prompts else self.prompts(batch.prompts)
        noise = None
        if self.config.sample_posterior:
            vae = self.student.vae
            sides = (side // vae.downscale_factor for side in batch.lq.shape[-2:])
            shape = (vae.config.latent_channels, *sides)
            noise = randomness.normal("posterior noise", shape)
        if step < self.config.latent_steps:
            restored = student(batch.lq, timesteps, prompts, posterior_noise=noise, decode=False)
            yield Phase("student", self._match_latents(restored.pred_x0, batch.hq, timesteps))
        else:
            restored = student(batch.lq, timesteps, prompts, posterior_noise=noise)
            if self.config.clamp_image:
                restored = restored._replace(image=restored.image.clamp(-1, 1))
            losses = self.restoration_losses(restored.image, batch, timesteps, randomness)
            if self.teacher is not None:
                tavsd = self._distillation_loss(restored.pred_x0, timesteps, batch, randomness)
                weighted = self.config.tavsd_weight.at(timesteps) * tavsd
                losses["tavsd"] = tavsd.mean()
                losses["loss"] = losses["loss"] + weighted.mean()
            yield Phase("student", losses)
        if self.teacher is not None:
            yield Phase("fake_score", self._fake_score_loss(restored.pred_x0, batch, randomness))
        gan_weight = self.config.gan_weight
        if not gan_weight.is_zero and restored.image is not None:
            discriminator = self.runtime.models["discriminator"]
            # One pass over both, or its normalisation would step twice.
            both = torch.cat([batch.hq, restored.image.detach()])
            real, fake = discriminator(both).float().chunk(2)
            share = gan_weight.at(timesteps) / gan_weight.largest
            loss = (share * discriminator_loss(real, fake)).mean()
            yield Phase("discriminator", {"loss": loss})

    @torch.no_grad()
    def preview(self, hq: Tensor, lq: Tensor, timesteps: tuple[int, ...]) -> dict[str, Tensor]:
        """Return the LQ restored at each timestep."""
        embeds = self.prompts([self.preview_prompt])
        images = {}
        with self.runtime.autocast():
            for timestep in timesteps:
                t = torch.tensor([timestep], device=lq.device)
                images[f"t={timestep}"] = self.student(lq, t, embeds).image
        return images

    def _student_timesteps(self, randomness: SampleRandomness) -> Tensor:
        low, high = self.config.timestep_range
        if not self.config.timestep_grid:
            return randomness.integers("student timestep", low, high)
        grid = torch.linspace(low, high, self.config.timestep_grid).long()
        picks = randomness.integers("student timestep", 0, len(grid) - 1)
        return grid.to(picks.device)[picks]

    def _match_latents(self, pred_x0: Tensor, hq: Tensor, timesteps: Tensor) -> dict[str, Tensor]:
        scaling = self.student.vae.config.scaling_factor
        with torch.no_grad(), self.runtime.autocast():
            target = self.sharp_encoder.encode(hq, 0).latent_dist.mode().float() * scaling
        error = F.smooth_l1_loss(pred_x0, target, reduction="none").flatten(1).mean(1)
        # x0 carries 1/√ᾱ; undone here, or the largest timesteps would be all of the loss.
        weight = self.alphas_cumprod[timesteps].sqrt()
        return {"loss": (error * weight).mean(), "latent": error.mean()}

    def restoration_losses(
        self, image: Tensor, batch: Batch, timesteps: Tensor, randomness: SampleRandomness
    ) -> dict[str, Tensor]:
        """Return the weighted sum of restored images' losses as "loss", and each without weight."""
        config, hq = self.config, batch.hq
        target = _move(hq, batch.restored, config.restored_share, timesteps)
        per_sample = {}
        if not config.mse_weight.is_zero:
            mse = mse_per_sample(image, target)
            if config.blur:
                mse = blurred_mse(image, target, timesteps, last=config.timestep_range[1])
            per_sample["mse"] = (config.mse_weight, mse)
        for name, error in _PIXEL_ERRORS.items():
            weight = getattr(config, f"{name}_weight")
            if not weight.is_zero:
                per_sample[name] = (weight, error(image, target))
        if not config.perceptual_weight.is_zero:
            seen = _move(hq, batch.restored, config.perceptual_restored_share, timesteps)
            distance = self.perceptual_distance(*self._shifted(image, seen, randomness))
            per_sample["perceptual"] = (config.perceptual_weight, distance)
        if not config.gan_weight.is_zero:
            # The plain module: this pass gives the discriminator no gradients to synchronise.
            discriminator = self.networks["discriminator"].module.requires_grad_(False).eval()
            with self.runtime.autocast():
                scores = discriminator(image).float()
            per_sample["gan"] = (config.gan_weight, generator_loss(scores))
            discriminator.requires_grad_(True).train()
        total = image.new_zeros(())
        for weight, values in per_sample.values():
            total = total + (weight.at(timesteps) * values).mean()
        losses = {name: values.mean() for name, (_, values) in per_sample.items()}
        return {"loss": total, **losses}

    def _shifted(self, image: Tensor, hq: Tensor, randomness: SampleRandomness) -> list[Tensor]:
        """Crop pairs so that each begins elsewhere between 0 and `perceptual_shift_px`."""
        most = self.config.perceptual_shift_px
        if most == 0:
            return [image, hq]
        tops, lefts = (
            randomness.numbers(f"perceptual {side}", 0, most) for side in ("top", "left")
        )
        height, width = (side - most for side in image.shape[-2:])
        return [
            torch.stack([
                x[:, top : top + height, left : left + width]
                for x, top, left in zip(images, tops, lefts, strict=True)
            ])
            for images in (image, hq)
        ]  # fmt: skip

    def _distillation_loss(
        self, pred_x0: Tensor, timesteps: Tensor, batch: Batch, randomness: SampleRandomness
    ) -> Tensor:
        config = self.config
        last = len(self.alphas_cumprod) - 1
        if config.vsd_timestep == "linked":
            vsd_timesteps = link_timesteps(
                timesteps, config.vsd_lambda, config.vsd_gamma, last=last
            )
        elif config.vsd_timestep == "uniform":
            vsd_timesteps = randomness.integers("vsd timestep", *config.vsd_range)
        else:
            vsd_timesteps = torch.full_like(timesteps, config.vsd_fixed)
        texts = self._teacher_texts(batch)
        embeds = self.teacher_prompts(texts)
        negative = self.teacher_prompts([config.negative_prompt] * len(texts))
        teacher = guided_noise(
            self._frozen_noise(embeds, adapters=False),
            self._frozen_noise(negative, adapters=False),
            guidance_scale(vsd_timesteps, config.guidance, config.guidance_slope),
        )
        noise = randomness.normal("vsd noise", tuple(pred_x0.shape[1:]))
        fake_score = self._frozen_noise(embeds, adapters=True)
        return vsd_loss(pred_x0, noise, vsd_timesteps, self.alphas_cumprod, teacher, fake_score)

    def _frozen_noise(self, prompt_embeds: Tensor, *, adapters: bool):
        """Return the teacher's noise prediction, or with its adapters on the fake score's."""
        fake_score = self.networks["fake_score"].module
        unet = fake_score if adapters else self.teacher

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            if self.config.fake_score_rank > 0:
                unet.enable_adapters() if adapters else unet.disable_adapters()
            with self.runtime.autocast():
                return unet(noisy, timesteps, prompt_embeds).sample

        return predict

    def _fake_score_loss(
        self, pred_x0: Tensor, batch: Batch, randomness: SampleRandomness
    ) -> dict[str, Tensor]:
        model = self.runtime.models["fake_score"]
        if self.config.fake_score_rank > 0:
            self.teacher.enable_adapters()
        embeds = self.teacher_prompts(self._teacher_texts(batch))
        last = len(self.alphas_cumprod) - 1

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            return model(noisy, timesteps, embeds).sample

        loss = diffusion_loss(
            predict,
            pred_x0,
            randomness.normal("diffusion noise", tuple(pred_x0.shape[1:])),
            randomness.integers("diffusion timestep", 0, last),
            self.alphas_cumprod,
        )
        return {"loss": loss.mean()}

    def _teacher_texts(self, batch: Batch) -> list[str]:
        prompt = self.config.teacher_prompt
        return list(batch.prompts) if prompt is None else [prompt] * len(batch.prompts)


def _move(hq: Tensor, restored: Tensor | None, share: TimestepRamp, timesteps: Tensor) -> Tensor:
    """Return the originals moved towards a restoration network's results, mean colours kept."""
    if share.is_zero:
        return hq
    # Such networks shift colours, which would be most of the error of pixels and is nothing to
    # learn: the pipeline's colour fix gives each result its LQ's.
    added = restored - hq
    added = added - added.mean((-2, -1), keepdim=True)
    return hq + share.at(timesteps)[:, None, None, None] * added


def _describe_latents(checkpoint: Checkpoint) -> tuple[int, int, float]:
    vae = checkpoint.vae
    return checkpoint.unet.config.in_channels, vae.downscale_factor, vae.config.scaling_factor
