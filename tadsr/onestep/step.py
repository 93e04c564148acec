"""One image through the networks: encode, one step, decode; and what to do when that overflows."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tadsr.errors import TADSRError, not_finite
from tadsr.onestep.activations import by_rows
from tadsr.onestep.choose import OPENVINO_PX, ChosenStages, Stages
from tadsr.onestep.openvino import OpenVinoStages
from tadsr.onestep.plan import EngineName, EnginePlan
from tadsr.onestep.selfcheck import is_settled, remember_fastest, settle
from tadsr.onestep.stages import AnyStages, FusedStages
from tadsr.onestep.tasks import is_out_of_memory
from tadsr.progress import Progress
from tadsr.prompts import Prompts
from tadsr.schedule import latents_of

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from tadsr.networks.time_aware_vae import TimeAwareAutoencoderKL

_STAGE_NAMES = ("encoder", "UNet", "decoder")
_TIMED_REPEATS = 3
_SHARES = (0.25, 0.5)
"""Of the work, what is done after the encoder and after the UNet; from benchmarks/engine.py."""


class OneStepEngine(ChosenStages):
    """Runs the networks of one step.

    Args:
        vae: Time-aware autoencoder.
        unet: One-step student.
        alphas_cumprod: ᾱ, (T,).
        choice: "fused", "eager", "compile", "openvino", or "auto" for the fastest that can run;
            an `EnginePlan` is "fused" with these switches.
        mixes: Whether a CPU multiplies float32 weights in bfloat16 where that is faster.
        grow: Loads networks that compute by themselves, where those given are bare layers.

    The weights stay the modules' own; "fused" brings them into the memory layout that is fast, and
    the other ways bring them back. When modules or weights are changed, moved or cast, the next
    call notices.

    Source: TADSR (arXiv 2508.16557), one-step inference.
    """

    def chosen(
        self, vae: Any, unet: Any, choice: EngineName | EnginePlan | None = None
    ) -> OneStepEngine:
        """Return an engine with these settings for other networks, or with another choice."""
        grow = self.grow if unet is self.unet else None
        choice = self.choice if choice is None else choice
        return OneStepEngine(vae, unet, self.alphas_cumprod, choice, mixes=self.mixes, grow=grow)

    def encode(
        self,
        lq: Tensor,
        timesteps: Tensor | Sequence[int],
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Encode LQ images (B, 3, H, W) to scaled latents (B, C, H/f, W/f) at their timesteps."""
        return self._latents(self.stages.encode(lq, as_numbers(timesteps)).values, generator)

    def predict_x0(
        self, latents: Tensor, timesteps: Tensor | Sequence[int], prompts: Tensor | Prompts
    ) -> Tensor:
        """Take the student's one step on scaled latents (B, C, h, w)."""
        return self.stages.predict_x0(latents, as_numbers(timesteps), as_prompts(prompts)).values

    def decode(self, pred_x0: Tensor) -> Tensor:
        """Decode scaled latents to images (B, 3, H, W), clamped to [-1, 1]."""
        image, largest = self.stages.decode(pred_x0)
        if not largest < torch.inf:
            raise not_finite(self.unet.dtype)
        return image.clamp(-1, 1)

    def restore(
        self,
        lq: Tensor,
        timesteps: Tensor | Sequence[int],
        prompts: Tensor | Prompts,
        *,
        generator: torch.Generator | None = None,
        finish: Callable[[Tensor], Tensor] = lambda image: image.clamp(-1, 1),
        progress: Progress | None = None,
    ) -> Tensor:
        """Restore LQ images in one step.

        A network that overflows float16 is run again in a wider type.

        Args:
            lq: (B, 3, H, W), in [-1, 1]; H and W multiples of the autoencoder's factor.
            prompts: Embeddings (B, L, D), or what they are known by as well.
            generator: Samples the posterior; None takes its mean.
            finish: What follows on the device with the images, which may exceed [-1, 1]; it is
                launched before the check for overflow waits for the device. Clamps by default.
            progress: Called between the networks; may raise to cancel.
        """
        timesteps, prompts = as_numbers(timesteps), as_prompts(prompts)
        stages = self._settled(lq, timesteps, prompts)
        return self.take(stages, lq, timesteps, prompts, generator, finish, progress)

    def take(
        self,
        stages: AnyStages,
        lq: Any,
        timesteps: Sequence[int],
        prompts: Prompts,
        generator: torch.Generator | None = None,
        finish: Callable[[Any], Any] = lambda image: image,
        progress: Progress | None = None,
    ) -> Any:
        """Take the one step: encode, z_L / √ᾱ − r, decode; for whole images and for bands.

        Args:
            generator: Samples the posterior; None takes its mean.
        """
        ways = [stages] * len(_STAGE_NAMES)
        inputs, largest = [lq, None, None], [None, None, None]
        state = None if generator is None else generator.get_state()
        widened: set[int] = set()
        index = 0
        while True:
            if index == 0:
                if state is not None:
                    generator.set_state(state)  # the same noise when this is done again
                moments, largest[0] = ways[0].encode(inputs[0], timesteps)
                inputs[1] = self._latents(moments, generator)
            elif index == 1:
                inputs[2], largest[1] = ways[1].predict_x0(inputs[1], timesteps, prompts)
            else:
                image, largest[2] = ways[2].decode(inputs[2])
                result = finish(image)
            if progress is not None and index < len(_SHARES):
                progress(_SHARES[index])
            index += 1
            if index < len(ways) and not stages.checks_each:
                continue
            # Waits for the device; NaN is not below infinity.
            found = [x < torch.inf for x in torch.stack(largest[:index]).tolist()]
            if not all(found):
                # The first network that overflowed and those after it run once more.
                index = found.index(False)
                if not self.can_widen or index in widened:
                    raise not_finite(self.unet.dtype)
                widened.add(index)
                ways[index] = stages.of(*self._widen(index))
            elif index == len(ways):
                return result

    def remember(self, key: Hashable, count: Callable[[], int]) -> int:
        """Return what was counted for these networks, or count it."""
        key = (*(next(network.parameters()).dtype for network in (self.vae, self.unet)), key)
        if key not in self._counted:
            self._counted[key] = count()
        return self._counted[key]

    def warn_of_bands(self, reason: str) -> None:
        """Warn that bands take the place of an engine that was asked for."""
        if self.choice not in ("auto", "eager"):
            name = "an EnginePlan" if isinstance(self.choice, EnginePlan) else repr(self.choice)
            self._warn_once(
                f"engine {name} computes whole images, but this one is computed in bands by plain "
                f"layers, since {reason}; tiling=None never does"
            )

    def trusts_kernels(self, lq: Tensor, timesteps: Sequence[int], prompts: Prompts) -> bool:
        """Tell whether kernels compute, compared on an image first where they are new."""
        plan = getattr(self._settled(lq, timesteps, prompts), "plan", None)
        return plan is not None and plan.fused_kernels

    def _settled(self, lq: Tensor, timesteps: Sequence[int], prompts: Prompts) -> Stages:
        """Return the stages, compared with others where they are new to this device."""
        stages = self.stages
        while self.choice == "auto" and stages is not self._compared:
            is_new = isinstance(stages, FusedStages) and not is_settled(stages)
            if is_new and not settle(stages, self._eager, lq, timesteps, prompts):
                self._built = None
            self._compared, stages = stages, self.stages
        if not isinstance(stages, FusedStages) or min(lq.shape[-2:]) < OPENVINO_PX:
            return stages
        if self._faster is None or self._faster[0] is not stages:
            crop = lq[:1, :, :OPENVINO_PX, :OPENVINO_PX]
            self._faster = stages, self._faster_of(stages, crop, timesteps[:1], prompts[:1])
        return self._faster[1]

    def _faster_of(self, fused: FusedStages, *inputs: Any) -> Stages:
        """Return OpenVINO's stages where they are faster, or else the fused ones."""
        is_untimed = self.is_openvino_untimed()
        if not is_untimed and not (self.can_take_openvino() and self.fastest() == "openvino"):
            return fused
        multiplied, is_faster = self._multiplied(), False
        try:
            rival = OpenVinoStages(self.vae, self.unet, self.alphas_cumprod, multiplied)
            if not is_untimed:
                return rival
            is_faster = self._seconds(rival, *inputs) < self._seconds(fused, *inputs)
        except (TADSRError, RuntimeError, MemoryError) as error:  # OpenVINO's are RuntimeErrors
            if is_out_of_memory(error):
                return fused  # says nothing of the speed
        remember_fastest(self.vae, self.unet, multiplied, "openvino" if is_faster else "fused")
        return rival if is_faster else fused

    def _seconds(self, stages: Stages, *inputs: Any) -> float:
        times = []
        for _ in range(1 + _TIMED_REPEATS):
            begin = time.perf_counter()
            self.take(stages, *inputs)
            times.append(time.perf_counter() - begin)
        return min(times)

    def _latents(self, moments: Tensor, generator: torch.Generator | None) -> Tensor:
        noise = None
        if generator is not None:
            batch, channels, height, width = moments.shape
            shape = (batch, channels // 2, height, width)
            from diffusers.utils.torch_utils import randn_tensor  # heavy, and seldom needed

            noise = randn_tensor(shape, generator, moments.device, moments.dtype)
        scale = self.vae.config.scaling_factor
        return by_rows(
            lambda moments, noise: latents_of(moments, scale, noise), moments, noise,
            channels=moments.shape[1] // 2,
        )  # fmt: skip

    def _widen(self, index: int) -> tuple[TimeAwareAutoencoderKL, UNet2DConditionModel]:
        """Return the networks for one that overflowed, with the exponents of float32."""
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
        return self._wide.get("vae", self.vae), self._wide.get("unet", self.unet)


def as_numbers(timesteps: Tensor | Sequence[int]) -> tuple[int, ...]:
    """Return timesteps as ints; a tensor's device is waited for."""
    return tuple(timesteps.tolist() if isinstance(timesteps, Tensor) else timesteps)


def as_prompts(prompts: Tensor | Prompts) -> Prompts:
    """Wrap embeddings as prompts without cache keys."""
    return Prompts(prompts) if isinstance(prompts, Tensor) else prompts
