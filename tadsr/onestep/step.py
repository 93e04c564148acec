"""One image through the networks: encode, one step, decode; and what to do when that overflows."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import get_args

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from tadsr.errors import TADSRWarning, not_finite
from tadsr.networks.time_aware_vae import TimeAwareAutoencoderKL
from tadsr.onestep.plan import EngineName, EnginePlan, choose_plan
from tadsr.onestep.selfcheck import is_distrusted, is_eager_fastest, is_settled, settle
from tadsr.onestep.stages import CompiledStages, EagerStages, FusedStages
from tadsr.onestep.support import unknown_blocks, wrapped_modules
from tadsr.onestep.watch import ModuleWatch

Stages = EagerStages | CompiledStages | FusedStages

_STAGE_NAMES = ("encoder", "UNet", "decoder")


class OneStepEngine:
    """Runs the networks of one step.

    Args:
        vae: Time-aware autoencoder.
        unet: One-step student.
        alphas_cumprod: ᾱ, (T,).
        choice: "fused", "eager", "compile", or "auto" for "fused" where it is faster and can run;
            an `EnginePlan` is "fused" with these switches.

    The weights stay the modules' own; "fused" brings them into the memory layout that is fast, and
    the other ways bring them back. When modules or weights are changed, moved or cast, the next
    call notices.

    Raises:
        ValueError: `choice` is none of these.

    Source: TADSR (arXiv 2508.16557), one-step inference.
    """

    def __init__(
        self,
        vae: TimeAwareAutoencoderKL,
        unet: UNet2DConditionModel,
        alphas_cumprod: Tensor,
        choice: EngineName | EnginePlan = "auto",
    ) -> None:
        if not isinstance(choice, EnginePlan) and choice not in get_args(EngineName):
            raise ValueError(
                f"engine must be one of {', '.join(get_args(EngineName))} or an EnginePlan, "
                f"got {choice!r}"
            )
        self.vae = vae
        self.unet = unet
        self.alphas_cumprod = alphas_cumprod
        self.choice = choice
        self._eager = EagerStages(vae, unet, alphas_cumprod)
        self._built: tuple[ModuleWatch, Stages] | None = None
        self._wide: dict[str, nn.Module] = {}
        self._has_channels_last = False
        self._warned: set[str] = set()
        self._compared: Stages | None = None

    def __getstate__(self) -> dict[str, object]:
        # What is folded and recorded belongs to these very weights; a copy makes its own.
        return {**vars(self), "_built": None, "_wide": {}, "_compared": None}

    def release(self) -> None:
        """Free what was folded and recorded, and bring the weights back into torch's layout."""
        self._built = self._compared = None
        self._wide.clear()
        self._lay_out(False)

    @property
    def stages(self) -> Stages:
        """The stages for the modules and weights as they are now."""
        if self.choice == "eager":
            return self._eager
        # Not of the UNet's device, which is "meta" while its weights are kept elsewhere.
        if torch.is_grad_enabled() or any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
            # What is folded has no gradient.
            return self._eager
        if self._built is None or not self._built[0].is_current():
            self._built = None  # frees graphs and folded weights before new ones are made
            self._wide.clear()
            stages = self._build()
            self._built = (ModuleWatch([self.vae, self.unet]), stages)
        return self._built[1]

    def encode(
        self, lq: Tensor, timesteps: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Encode LQ images (B, 3, H, W) to scaled latents (B, C, H/f, W/f) at their timesteps."""
        return self._latents(self.stages.encode(lq, timesteps).values, generator)

    def predict_x0(self, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Take the student's one step on scaled latents (B, C, h, w)."""
        return self.stages.predict_x0(latents, timesteps, prompt_embeds).values

    def decode(self, pred_x0: Tensor) -> Tensor:
        """Decode scaled latents to images (B, 3, H, W), clamped to [-1, 1].

        Raises:
            TADSRError: The result is not finite.
        """
        image, is_finite = self.stages.decode(pred_x0)
        if not is_finite:
            raise not_finite(self.unet.dtype)
        return image.clamp(-1, 1)

    def restore(
        self,
        lq: Tensor,
        timesteps: Tensor,
        prompt_embeds: Tensor,
        *,
        generator: torch.Generator | None = None,
        finish: Callable[[Tensor], Tensor] = lambda image: image,
    ) -> Tensor:
        """Restore LQ images in one step.

        A stage that overflows float16 is done again in a wider type.

        Args:
            lq: (B, 3, H, W), in [-1, 1]; H and W multiples of the autoencoder's factor.
            timesteps: One per image, (B,), int64.
            prompt_embeds: (B, L, D).
            generator: Samples the posterior; None takes its mean.
            finish: What follows on the device with the images in [-1, 1]; it is launched before
                the check for overflow waits for the device.

        Returns:
            What `finish` returns of images shaped as `lq`.

        Raises:
            TADSRError: The result is not finite.
        """
        # The first stage that overflows and those after it run once more.
        stages: list[Stages] = [self._settled(lq, timesteps, prompt_embeds)] * len(_STAGE_NAMES)
        can_widen = self.unet.dtype == torch.float16 and stages[0] is not self._eager
        stages[0].prepare(timesteps, prompt_embeds)
        inputs: list[Tensor] = [lq, lq, lq]
        flags: list[Tensor] = [lq, lq, lq]
        widened: set[int] = set()
        start = 0
        while True:
            if start == 0:
                moments, flags[0] = stages[0].encode(inputs[0], timesteps)
                inputs[1] = self._latents(moments, generator)
            if start <= 1:
                inputs[2], flags[1] = stages[1].predict_x0(inputs[1], timesteps, prompt_embeds)
            image, flags[2] = stages[2].decode(inputs[2])
            result = finish(image.clamp(-1, 1))
            found = torch.stack(flags).tolist()  # waits for the device
            if all(found):
                return result
            start = found.index(False)
            if not can_widen or start in widened:
                raise not_finite(self.unet.dtype)
            widened.add(start)
            stages[start] = self._widen(start)

    def _settled(self, lq: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> Stages:
        """Return the stages, compared with plain modules where they are new to this GPU."""
        stages = self.stages
        while self.choice == "auto" and stages is not self._compared:
            is_new = isinstance(stages, FusedStages) and not is_settled(stages)
            if is_new and not settle(stages, self._eager, lq, timesteps, prompt_embeds):
                self._built = None
            self._compared, stages = stages, self.stages
        return stages

    def _latents(self, moments: Tensor, generator: torch.Generator | None) -> Tensor:
        mean, log_variance = moments.chunk(2, dim=1)
        if generator is not None:
            noise = randn_tensor(mean.shape, generator, mean.device, mean.dtype)
            mean = mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise
        return mean * self.vae.config.scaling_factor

    def _build(self) -> Stages:
        plan = self._choose()
        self._lay_out(plan is not None and plan.channels_last)
        if plan is not None:
            return FusedStages(self.vae, self.unet, self.alphas_cumprod, plan)
        if self.choice == "compile":
            return CompiledStages(self.vae, self.unet, self.alphas_cumprod)
        return self._eager

    def _lay_out(self, channels_last: bool) -> None:
        # Also where it was so before: a module that was put in since is not.
        if channels_last or self._has_channels_last:
            layout = torch.channels_last if channels_last else torch.contiguous_format
            for network in (self.vae, self.unet):
                network.to(memory_format=layout)
            self._has_channels_last = channels_last

    def _choose(self) -> EnginePlan | None:
        """Return the fused engine's plan, or None for another way."""
        if self.choice in ("eager", "compile"):
            return None
        plan = self.choice
        if not isinstance(plan, EnginePlan):
            plan = choose_plan(self.unet.device, self.unet.dtype)
            if plan is None and self.choice == "fused":
                plan = EnginePlan(channels_last=False)
        if plan is None:
            return None
        networks = (self.vae, self.unet)
        if self.choice == "auto" and (
            is_distrusted(*networks, plan) or is_eager_fastest(*networks)
        ):
            return None
        reasons = unknown_blocks(self.vae, self.unet)
        if self.choice == "auto" and not reasons and wrapped_modules(self.vae, self.unet):
            # Adapters kept apart and offloading are asked for elsewhere.
            return None
        reasons += wrapped_modules(self.vae, self.unet)
        if not reasons:
            return plan
        self._warn_once(
            f"the fused engine cannot run this model as it is: {'; '.join(reasons)}. Its plain "
            'modules compute the same, slower; engine="eager" chooses them without this warning'
        )
        return None

    def _widen(self, index: int) -> EagerStages:
        """Return stages for one that overflowed, with the exponents of float32."""
        part = "unet" if index == 1 else "vae"
        dtype = torch.float32
        # The autoencoder is small, and bfloat16 would show in the picture.
        if part == "unet" and self.unet.device.type == "cuda" and torch.cuda.is_bf16_supported():
            dtype = torch.bfloat16
        self._warn_once(
            f"the {_STAGE_NAMES[index]} overflowed {self.unet.dtype} and was done again in "
            f"{dtype}, as it will be whenever that happens; torch_dtype=torch.bfloat16 or "
            "torch.float32 avoids the first try"
        )
        if part not in self._wide:
            self._wide[part] = copy.deepcopy(getattr(self, part)).to(dtype)
        return EagerStages(
            self._wide.get("vae", self.vae), self._wide.get("unet", self.unet), self.alphas_cumprod
        )

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, TADSRWarning, stacklevel=2)
