"""The trainer: runs any stage on accelerate, with checkpoints that continue to the bit."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, set_seed
from torch import Tensor, nn
from tqdm import tqdm

from tadsr.config import torch_dtype
from tadsr.errors import TADSRWarning, TrainingError
from tadsr.measure.perceptual import PerceptualDistance
from tadsr.training.data import Batch, Restorer, TrainingData, open_data
from tadsr.training.export import TrainingFacts, export_model
from tadsr.training.networks import keep_frozen_weights_in
from tadsr.training.randomness import SampleRandomness
from tadsr.training.run_folder import RunLog, StopRequest, claim_folder
from tadsr.training.stages.base import Runtime
from tadsr.training.stages.build import build_stage
from tadsr.training.state import RunState
from tadsr.training.training_config import TrainingConfig
from tadsr.training.validation import Validator

logger = logging.getLogger(__name__)

_MEAN_DECAY = 0.98
"""Decay per step of the running mean that an exploding loss is compared with."""
_LONG_WARMUP = 0.1
"""Share of a run above which its warm-up is remarked on."""
_SETTLING_STEPS = 20
"""Steps before a loss is compared with its mean."""


class Trainer:
    """Train a stage; an interrupted run in the same output folder goes on where it was.

    Everything is checked here, before the first step: data, prompts, sizes, the teacher's kind
    of prediction, and that the output folder is not another run's.

    Args:
        config: The run.
        perceptual: A perceptual distance to use in place of the one that the stage's
            configuration names.
        restorer: A restoration network to use in place of `data.restored.network`; RGB in [0, 1]
            (B, 3, h, w) to (B, 3, scale·h, scale·w).

    Raises:
        ValueError: A value does not fit the model or the data, or there is nothing to train on.
        TADSRError: A checkpoint or a library is missing or unfit, or the folder is another run's.

    Source: TADSR (arXiv 2508.16557), training.
    """

    def __init__(
        self,
        config: TrainingConfig,
        *,
        perceptual: PerceptualDistance | None = None,
        restorer: Restorer | None = None,
    ) -> None:
        self.config = config
        self.folder = Path(config.output)
        self.accelerator = self._make_accelerator()
        self.data: TrainingData = open_data(config.data, seed=config.seed, restorer=restorer)
        self.stage = build_stage(config, self.folder, perceptual)
        factor = self.stage.checkpoint.vae.downscale_factor
        if config.data.crop_px % factor:
            raise ValueError(
                f"data.crop_px must be a multiple of {factor}, the autoencoder's factor, got "
                f"{config.data.crop_px}"
            )
        self.stage.check_prompts(self.data.prompts() or (config.data.prompt,))
        self.validator = Validator(config.validation, config.data.scale, factor)
        self.networks = {name: n.module for name, n in self.stage.networks.items()}
        self.parameters = {
            name: [p for p in module.parameters() if p.requires_grad]
            for name, module in self.networks.items()
        }
        if self.accelerator.is_main_process:
            claim_folder(self.folder, config)
        self.accelerator.wait_for_everyone()
        self._warn_of_long_warmup()
        self.log = RunLog(self.folder)
        self.step = 0
        self.means: dict[str, float] = {}
        self.metrics: dict[str, Any] = {}
        self.num_skipped = 0
        self.is_stopping = False

    def train(self) -> Path:
        """Run the remaining steps and export the result.

        Returns:
            The folder of the trained pipeline, loadable by `TADSRPipeline.from_pretrained`.

        Raises:
            TrainingError: The loss is not finite or explodes; the state before that step is saved.
            KeyboardInterrupt: After saving the state.
        """
        self._prepare()
        checkpoint = self.state.latest()
        if checkpoint is not None:
            self._resume(checkpoint)
        elif self.accelerator.is_main_process:
            self.log.truncate(0)
        config = self.config
        if config.data.restored is not None:
            place = (self.accelerator.process_index, self.accelerator.num_processes)
            self.data.prepare(self.accelerator.device, *place)
            self.accelerator.wait_for_everyone()
        batches = self.data.batches(
            batch_size=config.batch_size,
            first_sample=self.step * self._samples_per_step,
            rank=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        self.log.start_clock(self.step)
        try:
            with StopRequest() as stop, self._progress_bar() as bar:
                while self.step < config.steps:
                    self._one_step(batches, stop)
                    bar.update()
                    is_last = self.step == config.steps
                    if self.step % config.log_every == 0 or is_last:
                        self._write_log(bar)
                    if self.validator.is_due(self.step, is_last):
                        self._validate()
                    if self.step % config.save_every == 0 or is_last or self.is_stopping:
                        self._save()
                    if self.is_stopping and not is_last:
                        raise KeyboardInterrupt
        finally:
            batches.close()  # ends its worker processes
            if config.trackers:
                self.accelerator.end_training()
        return self.export()

    def export(self) -> Path:
        """Write the trained pipeline with a model card, and adapters in the published format.

        Returns:
            `output`/model, loadable by `TADSRPipeline.from_pretrained`.

        Raises:
            CheckpointError: The folder cannot be written.
        """
        target = self.folder / "model"
        if self.accelerator.is_main_process:
            self._use_average()
            samples = self.data.batches(batch_size=self.config.batch_size)
            self.stage.finish(samples)
            samples.close()
            facts = TrainingFacts(
                self.step, self.data.description, self.metrics, self.accelerator.num_processes
            )
            export_model(self.stage.checkpoint, target, self.config, facts)
            logger.info("exported %s", target)
        self.accelerator.wait_for_everyone()
        return target

    @property
    def _samples_per_step(self) -> int:
        config = self.config
        per_process = config.batch_size * config.gradient_accumulation_steps
        return per_process * self.accelerator.num_processes

    def _warn_of_long_warmup(self) -> None:
        for name, network in self.stage.networks.items():
            warmup = network.optimizer.warmup_steps
            if warmup > _LONG_WARMUP * self.config.steps and self.accelerator.is_main_process:
                warnings.warn(
                    f"the warm-up of {name} takes {warmup} of the run's {self.config.steps} steps, "
                    "at less than the full learning rate; shorten warmup_steps or train longer",
                    TADSRWarning,
                    stacklevel=3,
                )

    def _make_accelerator(self) -> Accelerator:
        config = self.config
        stage = config.stage
        # Only then does a step leave trained parameters out.
        skips_decoder = getattr(stage, "latent_steps", 0) > 0 and stage.train_decoder
        arguments = {
            "mixed_precision": "no" if config.precision == "fp32" else config.precision,
            "gradient_accumulation_steps": config.gradient_accumulation_steps,
            "cpu": config.device == "cpu",
            "log_with": list(config.trackers) or None,
            "project_dir": str(self.folder),
            "kwargs_handlers": [
                DistributedDataParallelKwargs(find_unused_parameters=skips_decoder)
            ],
        }
        try:
            return Accelerator(**arguments)
        except ValueError as error:
            if "AcceleratorState" not in str(error):
                raise
            # Accelerate keeps the first run's precision for the whole process.
            AcceleratorState._reset_state()
            return Accelerator(**arguments)

    def _prepare(self) -> None:
        """Move everything into place: devices, precision, optimizers, averages, trackers."""
        config, accelerator = self.config, self.accelerator
        # Nothing of ours draws from global generators, but a perceptual distance may.
        set_seed(config.seed)
        frozen = self.stage.frozen()
        modules = [*frozen, *self.networks.values()]
        if config.precision != "fp32":
            narrow = [module for module in modules if module is not self.stage.perceptual]
            keep_frozen_weights_in(torch_dtype(config.precision), *narrow)
        layout = torch.channels_last if config.channels_last else torch.preserve_format
        for module in modules:
            module.to(device=accelerator.device, memory_format=layout)
        if config.gradient_checkpointing:
            for module in (m for network in modules for m in network.modules()):
                if getattr(module, "_supports_gradient_checkpointing", False):
                    module.enable_gradient_checkpointing()
        for module in frozen:
            module.eval()
        self.models, self.optimizers = {}, {}
        for name, (module, optimizer) in self.stage.networks.items():
            module.train()
            adamw = torch.optim.AdamW(
                self.parameters[name],
                lr=optimizer.learning_rate,
                betas=optimizer.betas,
                weight_decay=optimizer.weight_decay,
            )
            self.models[name], self.optimizers[name] = accelerator.prepare(module, adamw)
        self.stage.start(Runtime(accelerator.device, accelerator.autocast, self.models))
        self.state = RunState(
            self.folder / "checkpoints", accelerator, self.networks, config.keep_checkpoints
        )
        if config.ema_decay > 0:
            self.state.average = {
                name: parameter.detach().clone()
                for name, parameter in self._main_network.named_parameters()
                if parameter.requires_grad
            }
        if config.trackers:
            accelerator.init_trackers("tadsr")

    @property
    def _main_network(self) -> nn.Module:
        return next(iter(self.networks.values()))

    def _resume(self, checkpoint: Path) -> None:
        progress = self.state.load(checkpoint)
        self.step = progress["step"]
        self.means = progress["means"]
        self.metrics = progress["metrics"]
        self.num_skipped = progress["num_skipped"]
        if self.accelerator.is_main_process:
            # Lines after the checkpoint will be written again.
            self.log.truncate(self.step)
            logger.info("continuing %s at step %d", self.folder, self.step)

    def _one_step(self, batches: Iterator[Batch], stop: StopRequest) -> None:
        """Accumulate gradients over the step's batches and step every optimizer once."""
        accelerator = self.accelerator
        self._set_learning_rates()
        names: list[str] = []
        for _ in range(self.config.gradient_accumulation_steps):
            batch = next(batches)
            names += batch.names
            self._note_skipped(batch)
            batch = batch.to(accelerator.device)
            randomness = SampleRandomness(self.config.seed, batch.indices, accelerator.device)
            with accelerator.accumulate(*self.models.values()):
                for network, losses in self.stage.phases(batch, self.step, randomness):
                    self._check_loss(network, losses["loss"], stop, batch, names)
                    accelerator.backward(losses["loss"])
                    for name, value in losses.items():
                        self.log.add(f"{network}.{name}", value.detach())
        self._step_optimizers()
        self._update_average()
        self.step += 1

    def _step_optimizers(self) -> None:
        """Clip and step; with fp16, one scale serves all optimizers and changes after the last."""
        scaler = self.accelerator.scaler
        # A network may have had no phase, such as a discriminator while latents are matched.
        stepped = {
            name: optimizer
            for name, optimizer in self.optimizers.items()
            if any(p.grad is not None for p in self.parameters[name])
        }
        for name, optimizer in stepped.items():
            if scaler is not None:
                scaler.unscale_(optimizer.optimizer)
            norm = self._clip(name, self.stage.networks[name].optimizer.max_grad_norm)
            self.log.add(f"{name}.grad_norm", norm)
        for optimizer in stepped.values():
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer.optimizer)
            optimizer.zero_grad(set_to_none=True)
        if scaler is not None:
            scaler.update()

    def _clip(self, name: str, limit: float) -> Tensor:
        if self.accelerator.distributed_type == DistributedType.FSDP:
            return self.accelerator.clip_grad_norm_(self.models[name].parameters(), limit)
        return nn.utils.clip_grad_norm_(self.parameters[name], limit)

    def _set_learning_rates(self) -> None:
        for name, optimizer in self.optimizers.items():
            settings = self.stage.networks[name].optimizer
            factor = settings.factor_at(self.step, self.config.steps)
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * factor

    def _check_loss(
        self, network: str, loss: Tensor, stop: StopRequest, batch: Batch, names: list[str]
    ) -> None:
        """Stop all processes where one has a loss that training cannot go on from."""
        # One exchange for both questions: is the loss sound, has someone asked to stop?
        flags = torch.stack([loss.detach().float(), torch.tensor(float(stop.is_asked)).to(loss)])
        value, stopping = self.accelerator.reduce(flags, "mean").tolist()
        self.is_stopping = stopping > 0
        mean = self.means.get(network, value)
        limit = self.config.max_loss_ratio * abs(mean)
        if math.isfinite(value) and (self.step < _SETTLING_STEPS or value <= limit):
            self.means[network] = _MEAN_DECAY * mean + (1 - _MEAN_DECAY) * value
            return
        saved = self.state.save(self.step, self._progress(), name=f"failed_{self.step:08d}")
        raise TrainingError(
            f"the loss of {network} must stay finite and below {self.config.max_loss_ratio:g} "
            f"times its running mean {mean:.4g}, got {value} at step {self.step}, samples "
            f"{batch.indices.tolist()} ({', '.join(names)}); the state before that step is in "
            f"{saved}. Lower the learning rate, or use bf16 in place of fp16, and start from an "
            "earlier checkpoint"
        )

    def _note_skipped(self, batch: Batch) -> None:
        self.num_skipped += len(batch.skipped)
        if self.accelerator.is_main_process:
            for reason in batch.skipped:
                self.log.write({"step": self.step, "skipped": reason})

    @torch.no_grad()
    def _update_average(self) -> None:
        if not self.state.average:
            return
        # A short average at the start, or the first weights would linger in it.
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        parameters = dict(self._main_network.named_parameters())
        current = [parameters[name].detach() for name in self.state.average]
        torch._foreach_lerp_(list(self.state.average.values()), current, 1 - decay)

    @torch.no_grad()
    def _use_average(self) -> dict[str, Tensor]:
        """Put averaged weights in place; return those that were there."""
        parameters = dict(self._main_network.named_parameters())
        before = {name: parameters[name].detach().clone() for name in self.state.average}
        for name, tensor in self.state.average.items():
            parameters[name].copy_(tensor)
        return before

    def _write_log(self, bar: tqdm) -> None:
        rates = {
            f"{name}.lr": optimizer.param_groups[0]["lr"]
            for name, optimizer in self.optimizers.items()
        }
        means = self.log.means(self.accelerator)
        speed = self.log.speed(self._samples_per_step, self.step)
        if self.accelerator.is_main_process:
            self.log.write({"step": self.step} | means | rates | speed)
        main = next(iter(self.networks))
        bar.set_postfix(loss=f"{means[f'{main}.loss']:.4g}")
        if self.config.trackers:
            self.accelerator.log(means | rates | speed, step=self.step)

    @torch.no_grad()
    def _validate(self) -> None:
        if self.accelerator.is_main_process:
            before = self._use_average()
            main = self._main_network.eval()
            picture = self.folder / "samples" / f"step_{self.step:08d}.png"
            self.metrics = self.validator.run(self.stage, self.accelerator.device, picture)
            main.train()
            parameters = dict(main.named_parameters())
            for name, tensor in before.items():
                parameters[name].copy_(tensor)
            self.log.write({"step": self.step, "validation": self.metrics})
        self.accelerator.wait_for_everyone()

    def _save(self) -> None:
        self.state.save(self.step, self._progress())

    def _progress(self) -> dict[str, Any]:
        return {"means": self.means, "metrics": self.metrics, "num_skipped": self.num_skipped}

    def _progress_bar(self) -> tqdm:
        # None: a bar on a terminal only, of the main process only.
        disable = None if self.accelerator.is_main_process else True
        total = self.config.steps
        return tqdm(total=total, initial=self.step, unit="step", disable=disable)
