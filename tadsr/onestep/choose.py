"""Which stages run the networks, and why: chosen in one place."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor, nn

from tadsr.caches import ModuleWatch, RecentlyUsed
from tadsr.errors import TADSRWarning
from tadsr.kernels.backends import failure_on
from tadsr.onestep.openvino import OpenVinoStages, check_openvino, has_openvino
from tadsr.onestep.plan import EngineName, EnginePlan, choose_plan
from tadsr.onestep.products import choose_products
from tadsr.onestep.selfcheck import is_distrusted, recall_fastest
from tadsr.onestep.stages import CompiledStages, EagerStages, FusedStages
from tadsr.onestep.support import unknown_blocks, wrapped_modules

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from tadsr.networks.time_aware_vae import TimeAwareAutoencoderKL

Stages = EagerStages | CompiledStages | FusedStages

_MAX_COUNTED = 64
OPENVINO_PX = 512
"""Shortest side of images for which "auto" may take OpenVINO in place of the fused engine."""
_MAX_TIMED_BYTES = 2**28
"""Weights of networks for which OpenVINO's graphs are made without being asked: of larger ones they
take long to make and their size on the disk."""


class ChosenStages:
    """Networks, and the stages that run them as they are now; arguments as of `OneStepEngine`."""

    def __init__(
        self,
        vae: TimeAwareAutoencoderKL,
        unet: UNet2DConditionModel,
        alphas_cumprod: Tensor,
        choice: EngineName | EnginePlan = "auto",
        *,
        mixes: bool = False,
        grow: Callable[[], tuple[nn.Module, nn.Module]] | None = None,
    ) -> None:
        if not isinstance(choice, EnginePlan) and choice not in get_args(EngineName):
            raise ValueError(
                f"engine must be one of {', '.join(get_args(EngineName))} or an EnginePlan, "
                f"got {choice!r}"
            )
        if choice == "openvino":
            check_openvino()
        self.vae = vae
        self.unet = unet
        self.alphas_cumprod = alphas_cumprod
        self.choice = choice
        self.mixes = mixes
        self.grow = grow
        self._eager = EagerStages(vae, unet, alphas_cumprod)
        self._built: tuple[ModuleWatch, Stages] | None = None
        self._wide: dict[str, nn.Module] = {}
        self._has_channels_last = False
        self._warned: set[str] = set()
        self._compared: Stages | None = None
        self._faster: tuple[Stages, Stages] | None = None
        self._counted: dict[Hashable, int] = RecentlyUsed(_MAX_COUNTED)

    def __getstate__(self) -> dict[str, object]:
        # What is folded and recorded belongs to these very weights; a copy makes its own.
        return {**vars(self), "_built": None, "_wide": {}, "_compared": None, "_faster": None}

    @cached_property
    def downscale_factor(self) -> int:
        """Pixels per latent along one side."""
        return self.vae.downscale_factor

    def need_modules(self) -> None:
        """Load networks that compute by themselves in place of bare layers."""
        if self.grow is not None:
            self.vae, self.unet = self.grow()
            self.grow = self._built = None
            self._eager = EagerStages(self.vae, self.unet, self.alphas_cumprod)

    def release(self) -> None:
        """Free what was folded and recorded, and bring the weights back into torch's layout."""
        self._built = self._compared = self._faster = None
        self._wide.clear()
        self._lay_out(False)

    @property
    def graph_bytes(self) -> int:
        """Memory of recorded graphs, which nothing else can use."""
        graphs = None if self._built is None else getattr(self._built[1], "graphs", None)
        return 0 if graphs is None else graphs.pool_bytes

    def drop_graphs(self) -> None:
        """Free the memory of recorded graphs; those that are needed are recorded anew."""
        if self.graph_bytes:
            self._built[1].graphs.clear()

    @property
    def stages(self) -> Stages:
        """The stages for the modules and weights as they are now."""
        if self.choice == "eager":
            self.need_modules()
            return self._eager
        # Not of the UNet's device, which is "meta" while its weights are kept elsewhere.
        if torch.is_grad_enabled() or any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
            # What is folded has no gradient.
            self.need_modules()
            return self._eager
        if self._built is None or not self._built[0].is_current() or self._has_lost_kernels():
            self._built = None  # frees graphs and folded weights before new ones are made
            self._wide.clear()
            stages = self._build()
            self._built = (ModuleWatch([self.vae, self.unet]), stages)
        return self._built[1]

    def is_fused(self, size: Sequence[int]) -> bool:
        """Tell whether images (H, W) go through the fused layers, which need the least memory."""
        stages = self.stages
        if not isinstance(stages, FusedStages) or min(size) < OPENVINO_PX:
            return isinstance(stages, FusedStages)
        if self._faster is not None and self._faster[0] is stages:
            return self._faster[1] is stages
        return not self.can_take_openvino() or self.fastest() != "openvino"

    @property
    def can_widen(self) -> bool:
        """Whether a network that overflows is run again in a wider type."""
        return self.unet.dtype == torch.float16 and self.stages is not self._eager

    def can_take_openvino(self) -> bool:
        """Tell whether "auto" may take OpenVINO for large images.

        Not where diffusers would have to be imported for it: that takes longer than it saves.
        """
        kind = (self.unet.device.type, self.unet.dtype)
        is_possible = self.choice == "auto" and kind == ("cpu", torch.float32) and not self.grow
        return is_possible and has_openvino() and not wrapped_modules(self.vae, self.unet)

    def fastest(self) -> str | None:
        """Return the engine that was measured to be the fastest for these networks, or None."""
        return recall_fastest(self.vae, self.unet, self._multiplied())

    def is_openvino_untimed(self) -> bool:
        """Tell whether "auto" times OpenVINO beside the fused engine when a large image comes."""
        if not self.can_take_openvino() or self.fastest() is not None:
            return False
        parameters = (*self.vae.parameters(), *self.unet.parameters())
        return sum(values.nbytes for values in parameters) <= _MAX_TIMED_BYTES

    def _has_lost_kernels(self) -> bool:
        """Tell whether kernels that the plan was chosen for have turned out not to run."""
        plan = getattr(self._built[1], "plan", None)
        is_chosen = plan is not None and not isinstance(self.choice, EnginePlan)
        return is_chosen and plan.fused_kernels and failure_on(self.unet.device) is not None

    def _build(self) -> Stages:
        choice = self.choice
        plan = None if choice in ("eager", "compile", "openvino") else self._choose()
        if plan is None:
            self.need_modules()
        self._lay_out(plan is not None and plan.channels_last)
        if plan is not None:
            return FusedStages(self.vae, self.unet, self.alphas_cumprod, plan)
        if choice == "compile":
            return CompiledStages(self.vae, self.unet, self.alphas_cumprod)
        if choice == "openvino":
            return OpenVinoStages(self.vae, self.unet, self.alphas_cumprod, self._multiplied())
        return self._eager

    def _lay_out(self, channels_last: bool) -> None:
        # Also where it was so before: a module that was put in since is not.
        if channels_last or self._has_channels_last:
            layout = torch.channels_last if channels_last else torch.contiguous_format
            for network in (self.vae, self.unet):
                network.to(memory_format=layout)
            self._has_channels_last = channels_last

    def _choose(self) -> EnginePlan | None:
        """Return the fused engine's plan, or None for plain modules."""
        plan = self.choice
        if not isinstance(plan, EnginePlan):
            plan = choose_plan(self.unet.device, self.unet.dtype)
            if plan is None and self.choice == "fused":
                plan = EnginePlan(channels_last=False)
            if plan is not None and self.mixes:
                plan = replace(plan, multiplied=self._multiplied())
        networks, is_auto = (self.vae, self.unet), self.choice == "auto"
        if plan is None or (is_auto and is_distrusted(*networks, plan)):
            return None
        if is_auto and self.fastest() == "eager":
            return None
        reasons, wrapped = unknown_blocks(*networks), wrapped_modules(*networks)
        if is_auto and wrapped and not reasons:
            # Adapters kept apart and offloading are asked for elsewhere.
            return None
        reasons += wrapped
        if not reasons:
            return plan
        self._warn_once(
            f"the fused engine cannot run this model as it is: {'; '.join(reasons)}. Its plain "
            'modules compute the same, slower; engine="eager" chooses them without this warning'
        )
        return None

    def _multiplied(self) -> torch.dtype | None:
        """Return the type in which a CPU multiplies float32 weights; None for their own."""
        return choose_products(self.unet.device, self.unet.dtype).multiplied if self.mixes else None

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, TADSRWarning, stacklevel=2)
