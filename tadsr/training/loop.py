"""The training loop that every stage shares: batches, optimizer, averaged weights, resuming."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tadsr.errors import CheckpointError
from tadsr.training.config import DataConfig, OptimizerConfig, RunConfig
from tadsr.training.data import DegradedCrops, load_photos

logger = logging.getLogger(__name__)

StepLoss = Callable[[Tensor, Tensor, int, torch.Generator], dict[str, Tensor]]
"""(hq, lq, step, generator) -> named losses; the one called "loss" is minimised."""


def learning_rate_factor(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """Return the learning rate at a step as a fraction of the peak: warm-up, then cosine."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.final_fraction + (1 - config.final_fraction) * cosine


class TrainingLoop:
    """Train modules against a step's loss, writing checkpoints that an interrupted run continues.

    Args:
        modules: Named modules; parameters with `requires_grad` are trained.
        run: Length, place and device.
        data: Photographs.
        optimizer: AdamW's settings.
    """

    def __init__(
        self,
        modules: dict[str, nn.Module],
        run: RunConfig,
        data: DataConfig,
        optimizer: OptimizerConfig,
    ) -> None:
        self.modules = {name: module.to(run.device).train() for name, module in modules.items()}
        self.run = run
        self.data = data
        self.optimizer_config = optimizer
        self.parameters = {
            f"{name}.{key}": parameter
            for name, module in modules.items()
            for key, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=optimizer.learning_rate,
            betas=optimizer.betas,
            weight_decay=optimizer.weight_decay,
        )
        self.average = {k: p.detach().clone() for k, p in self.parameters.items()}
        self.step = 0
        self.folder = Path(run.output)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.checkpoint = self.folder / "state.pt"
        if self.checkpoint.exists():
            self._resume()

    def train(self, step_loss: StepLoss) -> None:
        """Run the remaining steps; on return the modules hold the averaged weights."""
        run = self.run
        if self.step < run.total_steps:
            batches = self._batches()
            started, first_step = time.monotonic(), self.step
            sums: dict[str, float] = {}
            while self.step < run.total_steps:
                for name, value in self._one_step(step_loss, next(batches)).items():
                    sums[name] = sums.get(name, 0.0) + value
                self.step += 1
                if self.step % run.log_every == 0:
                    rate = (self.step - first_step) / (time.monotonic() - started)
                    self._log({k: v / run.log_every for k, v in sums.items()}, rate)
                    sums = {}
                if self.step % run.save_every == 0 or self.step == run.total_steps:
                    self._save()
        with torch.no_grad():
            for key, parameter in self.parameters.items():
                parameter.copy_(self.average[key])

    def _one_step(self, step_loss: StepLoss, batch: list[Tensor]) -> dict[str, float]:
        run = self.run
        factor = learning_rate_factor(self.step, self.optimizer_config, run.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.optimizer_config.learning_rate * factor
        hq, lq = (t.to(run.device, non_blocking=True) for t in batch)
        # One generator per step, so that a continued run draws what an unbroken one would.
        generator = torch.Generator(run.device).manual_seed(run.seed * 1_000_003 + self.step)
        device_type = torch.device(run.device).type
        with torch.autocast(device_type, torch.bfloat16, enabled=run.precision == "bf16"):
            losses = step_loss(hq, lq, self.step, generator)
        loss = losses["loss"]
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss must be finite, got {loss.item()} at step {self.step}; lower the "
                f"learning rate and continue from {self.checkpoint}"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(
            self.parameters.values(), self.optimizer_config.max_grad_norm
        )
        self.optimizer.step()
        # A short average at the start, or the random initial weights would linger in it.
        decay = min(run.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(
            list(self.average.values()),
            [p.detach() for p in self.parameters.values()],
            1 - decay,
        )
        return {k: v.item() for k, v in losses.items()} | {"grad_norm": norm.item()}

    def _batches(self) -> Iterator[list[Tensor]]:
        photos = load_photos(self.data.folder, self.data.crop_px)
        start = self.step * self.run.batch_size
        crops = DegradedCrops(photos, self.data, self.run.seed, start)
        workers = self.data.num_workers
        return iter(
            DataLoader(
                crops,
                batch_size=self.run.batch_size,
                num_workers=workers,
                prefetch_factor=4 if workers else None,
                pin_memory=torch.device(self.run.device).type == "cuda",
            )
        )

    def _log(self, means: dict[str, float], steps_per_second: float) -> None:
        line = {"step": self.step, "steps_per_second": round(steps_per_second, 3)}
        line |= {k: round(v, 5) for k, v in means.items()}
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        logger.info("%s", line)

    def _save(self) -> None:
        state = {
            "step": self.step,
            "parameters": {k: p.detach() for k, p in self.parameters.items()},
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.checkpoint)

    def _resume(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.run.device, weights_only=True)
        if state["parameters"].keys() != self.parameters.keys():
            raise CheckpointError(
                f"{self.checkpoint} must hold this stage's parameters, but its names differ; "
                "choose another output folder"
            )
        with torch.no_grad():
            for key, parameter in self.parameters.items():
                parameter.copy_(state["parameters"][key])
                self.average[key].copy_(state["average"][key])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        logger.info("continuing %s at step %d", self.folder, self.step)
