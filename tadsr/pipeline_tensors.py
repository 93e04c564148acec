"""What a pipeline does with tensors: the one step without resizing, colour fix or images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tadsr.conditioning import TimestepField, run_at
from tadsr.onestep import NetworkLock, OneStepEngine


class PipelineTensors:
    """The methods of `TADSRPipeline` that take and give tensors.

    Attributes:
        engine: What runs the networks that the pipeline holds now.
    """

    engine: OneStepEngine
    _lock: NetworkLock

    @torch.inference_mode(False)
    @torch.no_grad()
    def restore(
        self,
        lq: Tensor,
        timesteps: Tensor | Sequence[int] | TimestepField,
        prompt_embeds: Tensor,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Restore tensors in one step, without resizing or colour fix.

        Args:
            lq: LQ images at output resolution, (B, 3, H, W), in [-1, 1]; H and W multiples of
                `vae.downscale_factor`.
            timesteps: One timestep per image, or a map per image.
            prompt_embeds: Prompt embeddings, (B, L, D).
            generator: Samples the posterior; None takes its mean.

        Returns:
            Restored images, shaped as `lq`, clamped to [-1, 1], in the autoencoder's dtype.

        Source: TADSR (arXiv 2508.16557), one-step inference.
        """
        if isinstance(timesteps, Tensor):
            timesteps = timesteps.tolist()
        with self._lock:
            results = run_at(
                timesteps,
                lambda knot: self.engine.restore(lq, knot, prompt_embeds, generator=generator),
                generator,
            )
        is_map = isinstance(timesteps, TimestepField)
        return timesteps.mix(results, tuple(lq.shape[-2:])) if is_map else results[0]

    def encode_latents(
        self, lq: Tensor, timesteps: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Encode LQ images (B, 3, H, W) to scaled latents (B, C, H/f, W/f) at their timesteps."""
        with self._lock:
            return self.engine.encode(lq, timesteps, generator=generator)

    def predict_x0(self, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Take the student's one step on scaled latents (B, C, h, w)."""
        with self._lock:
            return self.engine.predict_x0(latents, timesteps, prompt_embeds)

    def decode_latents(self, pred_x0: Tensor) -> Tensor:
        """Decode scaled latents to images (B, 3, H, W), clamped to [-1, 1].

        Raises:
            TADSRError: The result is not finite.
        """
        with self._lock:
            return self.engine.decode(pred_x0)
