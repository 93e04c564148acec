"""What the trainer asks of a stage, and what it gives to one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tadsr.checkpoints.checkpoint import Checkpoint
from tadsr.measure.perceptual import PerceptualDistance
from tadsr.schedule import make_alphas_cumprod
from tadsr.training.data import Batch
from tadsr.training.randomness import SampleRandomness
from tadsr.training.stages.stage_config import OptimizerConfig, StageConfig


class TrainedNetwork(NamedTuple):
    """A module of a stage and the optimizer of its parameters that require gradients."""

    module: nn.Module
    optimizer: OptimizerConfig


class Phase(NamedTuple):
    """One network's part of a training step: "loss" is minimised, the others are logged."""

    network: str
    losses: dict[str, Tensor]


@dataclass
class Runtime:
    """The device and precision that a stage computes with."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    autocast: Callable[[], AbstractContextManager] = nullcontext
    """Context of the run's precision, for modules that the trainer does not wrap."""
    models: dict[str, nn.Module] = field(default_factory=dict)
    """The stage's networks as they must be called for gradients, such as wrapped by DDP."""


class Stage(ABC):
    """One kind of training: its networks, and the losses of a step."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        config = checkpoint.scheduler.config
        self.alphas_cumprod = make_alphas_cumprod(
            config.beta_start, config.beta_end, config.beta_schedule, config.num_train_timesteps
        )
        self.runtime = Runtime()

    config: StageConfig
    """What is done, with nothing left open."""
    networks: dict[str, TrainedNetwork]
    """What is trained, in the order of the phases; the first is what the run is about."""
    preview_prompt: str = ""
    """Prompt of `preview`."""
    perceptual: PerceptualDistance | None = None
    """Compares images; its network stays float32."""

    def frozen(self) -> list[nn.Module]:
        """Return further modules that losses are computed with."""
        return []

    def start(self, runtime: Runtime) -> None:
        """Take the device and precision to compute with, once, before the first step."""
        self.runtime = runtime
        self.alphas_cumprod = self.alphas_cumprod.to(runtime.device)

    def check_prompts(self, prompts: Sequence[str]) -> None:  # noqa: B027 - optional
        """Raise ValueError if a prompt that samples will have cannot be embedded."""

    def perceptual_distance(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return distances (B,), float32 under every precision: bf16 turns their gradients."""
        with torch.autocast(pred.device.type, enabled=False):
            return self.perceptual(pred.float(), target.float())

    @abstractmethod
    def phases(self, batch: Batch, step: int, randomness: SampleRandomness) -> Iterator[Phase]:
        """Yield each network's losses in turn; their gradients are taken before the next."""

    @abstractmethod
    def preview(self, hq: Tensor, lq: Tensor, timesteps: tuple[int, ...]) -> dict[str, Tensor]:
        """Return what the networks make of an image, by caption.

        Args:
            hq: The original, (1, 3, H, W), in [-1, 1].
        """

    def finish(self, batches: Iterator[Batch]) -> None:  # noqa: B027 - optional
        """Bring the checkpoint into the state that is exported."""
