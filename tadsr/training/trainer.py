"""The trainer: runs any stage on accelerate, with checkpoints that continue to the bit."""

from __future__ import annotations

import logging
import math
import signal
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, set_seed
from torch import Tensor, nn

from tadsr.config import torch_dtype
from tadsr.errors import DataError, TADSRWarning, Terminated, TrainingError
from tadsr.measure.perceptual import PerceptualDistance
from tadsr.training.acceleration import compile_networks, keep_frozen_weights_in, make_accelerator
from tadsr.training.data import Batch, Restorer, TrainingData, open_data
from tadsr.training.optimization import Optimizers, WeightAverage, warn_of_long_warmup
from tadsr.training.randomness import SampleRandomness
from tadsr.training.run_folder import RunState, claim_folder, locked
from tadsr.training.run_log import (
    Progress,
    RunLog,
    check_trackers,
    start_trackers,
    track_validation,
)
from tadsr.training.stages.build import build_stage
from tadsr.training.stages.stage import Runtime
from tadsr.training.stopping import StopRequest, explain_failure
from tadsr.training.trained_model import export_model
from tadsr.training.training_config import TrainingConfig
from tadsr.training.validation import Validator

logger = logging.getLogger(__name__)

_MEAN_DECAY = 0.98
"""Decay per step of the running mean that an exploding loss is compared with."""
_SETTLING_STEPS = 20
"""Steps before a loss is compared with its mean."""
_KEPT = {"means", "metrics", "best", "num_samples", "num_skipped"}
"""What a checkpoint keeps of a trainer, beside its step."""


class Trainer:
    """Train a stage; an interrupted run in the same output folder goes on where it was.

    Everything is checked here, before the first step: data, prompts, sizes, the teacher's kind
    of prediction, and that the output folder is not another run's.

    Args:
        perceptual: In place of the distance that the stage's configuration names.
        restorer: A network in place of `data.restored.network`, from (B, 3, h, w) to
            (B, 3, scale·h, scale·w), RGB in [0, 1].

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
        self.folder = Path(config.output)
        check_trackers(config.trackers)
        self.accelerator = make_accelerator(config)
        self.data: TrainingData = open_data(config.data, seed=config.seed, restorer=restorer)
        # One process of a host downloads what there is to download.
        with self.accelerator.local_main_process_first():
            self.stage = build_stage(config, self.folder, perceptual)
        # With what was left to the model, so that a continued run does the same.
        self.config = config = replace(config, stage=self.stage.config)
        factor = self.stage.checkpoint.vae.downscale_factor
        if config.data.crop_px % factor:
            raise ValueError(
                f"data.crop_px must be a multiple of {factor}, the autoencoder's factor, got "
                f"{config.data.crop_px}"
            )
        self.stage.check_prompts(self.data.prompts() or (config.data.prompt,))
        has_perceptual = self.stage.perceptual is not None
        self.validator = Validator(config.validation, config.data.scale, factor, has_perceptual)
        self.networks = {name: n.module for name, n in self.stage.networks.items()}
        if self.accelerator.is_main_process:
            claim_folder(self.folder, config)
            warn_of_long_warmup(self.stage.networks, config.steps)
        self.accelerator.wait_for_everyone()
        self.log = RunLog(self.folder)
        self.state: RunState | None = None
        self.step = 0
        self.means: dict[str, float] = {}
        self.metrics: dict[str, Any] = {}
        self.best: float | None = None
        self.num_samples = 0
        self.num_skipped = 0
        self.is_stopping = False

    def train(self) -> Path:
        """Run the remaining steps and export the result.

        Returns:
            The folder of the trained pipeline, loadable by `TADSRPipeline.from_pretrained`.

        Raises:
            TrainingError: The loss is not finite or explodes (the state before that step is
                saved), memory or the disk is full, or another process trains in the folder.
            DataError: The samples cannot be made, or a process that prepares them has died.
            KeyboardInterrupt: Ctrl-C or SIGTERM came; the state is saved.
        """
        try:
            with self._locked():
                self._prepare()
                self._resume()
                if self.config.trackers:
                    start_trackers(self.accelerator, self.config)
                try:
                    self._run()
                finally:
                    if self.config.trackers:
                        self.accelerator.end_training()
                return self._export()
        except (DataError, MemoryError, RuntimeError, OSError, EOFError) as error:
            latest = None if self.state is None else self.state.latest()
            explained = explain_failure(error, self.step, self.folder, latest)
            if explained is error:
                raise
            raise explained from error

    def export(self) -> Path:
        """Write the trained pipeline with a model card, and adapters in the published format.

        Without `train` before, the newest checkpoint in the run's folder is exported.

        Returns:
            `output`/model, loadable by `TADSRPipeline.from_pretrained`.

        Raises:
            TrainingError: Nothing is trained yet, or another process trains in the folder.
            CheckpointError: The folder cannot be written.
        """
        with self._locked():
            if self.state is None:
                self._prepare()
                self._resume()
                if self.step == 0:
                    raise TrainingError(
                        f"{self.folder} must hold a checkpoint to export, but no step is done "
                        "yet; train first"
                    )
            return self._export()

    def _run(self) -> None:
        """Train from the present step to the last."""
        config = self.config
        if config.data.restored is not None:
            place = (self.accelerator.process_index, self.accelerator.num_processes)
            self.data.prepare(self.accelerator.device, *place)
            self.accelerator.wait_for_everyone()
        batches = self.data.batches(
            batch_size=config.batch_size,
            first_sample=self.num_samples,
            rank=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        is_main = self.accelerator.is_main_process
        try:
            with StopRequest() as stop, Progress(self.step, config.steps, is_main) as progress:
                if self.step == 0 and self.validator.pairs:
                    self._validate()
                self.log.start_clock(self.step)
                while self.step < config.steps:
                    self._one_step(batches, stop)
                    progress.update()
                    is_last = self.step == config.steps
                    if self.step % config.log_every == 0 or is_last:
                        self._write_log(progress)
                    if self.validator.is_due(self.step, is_last):
                        self._validate()
                    if self.step % config.save_every == 0 or is_last or self.is_stopping:
                        self._save()
                    if self.is_stopping and not is_last:
                        self._raise_stop(stop)
        finally:
            batches.close()  # ends its worker processes

    def _export(self) -> Path:
        target = self.folder / "model"
        if self.accelerator.is_main_process:
            self.average.use()
            samples = self.data.batches(batch_size=self.config.batch_size)
            self.stage.finish(samples)
            samples.close()
            export_model(
                self.stage.checkpoint,
                target,
                self.config,
                step=self.step,
                num_samples=self.num_samples,
                data=self.data.description,
                metrics=self.metrics,
            )
            logger.info("exported %s", target)
        self.accelerator.wait_for_everyone()
        return target

    @property
    def _samples_per_step(self) -> int:
        config = self.config
        per_process = config.batch_size * config.gradient_accumulation_steps
        return per_process * self.accelerator.num_processes

    def _locked(self):
        return locked(self.folder) if self.accelerator.is_main_process else nullcontext()

    def _prepare(self) -> None:
        """Move everything into place: devices, precision, optimizers, averages."""
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
        if config.compile:
            compile_networks(modules)
        for module in frozen:
            module.eval()
        for module in self.networks.values():
            module.train()
        self.optimizers = Optimizers(self.stage.networks, accelerator)
        models = self.optimizers.models
        self.stage.start(Runtime(accelerator.device, accelerator.autocast, models))
        self.average = WeightAverage(self._main_network, config.ema_decay)
        self.state = RunState(
            self.folder / "checkpoints",
            accelerator,
            self.networks,
            self.average.tensors,
            config.keep_checkpoints,
        )

    @property
    def _main_network(self) -> nn.Module:
        return next(iter(self.networks.values()))

    def _resume(self) -> None:
        """Resume from the newest checkpoint, if there is any."""
        checkpoint, is_main = self.state.latest(), self.accelerator.is_main_process
        if checkpoint is not None:
            progress = self.state.load(checkpoint)
            self.step = progress["step"]
            self.num_samples = self.step * self._samples_per_step  # of older versions
            for name in _KEPT & progress.keys():
                setattr(self, name, progress[name])
            before, now = progress.get("data"), self.data.description
            if is_main and before not in (None, now):
                what = f"{self.folder} was trained on {before} so far and goes on with {now}"
                warnings.warn(f"{what}: the samples change", TADSRWarning, stacklevel=3)
        if is_main:
            # Lines after the checkpoint will be written again.
            self.log.truncate(self.step or -1)
            if self.step:
                logger.info("continuing %s at step %d", self.folder, self.step)

    def _one_step(self, batches: Iterator[Batch], stop: StopRequest) -> None:
        """Accumulate gradients over the step's batches and step every optimizer once."""
        accelerator, optimizers = self.accelerator, self.optimizers
        optimizers.set_learning_rates(self.step, self.config.steps)
        seen: list[Batch] = []
        losses_of: dict[str, list[Tensor]] = {}
        for _ in range(self.config.gradient_accumulation_steps):
            batch = next(batches)
            seen.append(batch)
            self._note_skipped(batch)
            batch = batch.to(accelerator.device)
            randomness = SampleRandomness(self.config.seed, batch.indices, accelerator.device)
            with accelerator.accumulate(*optimizers.models.values()):
                for network, losses in self.stage.phases(batch, self.step, randomness):
                    accelerator.backward(losses["loss"])
                    losses_of.setdefault(network, []).append(losses["loss"].detach().float())
                    for name, value in losses.items():
                        self.log.add(f"{network}.{name}", value.detach())
        norms = optimizers.clip()
        self._check(losses_of, norms, stop, seen)
        for name, norm in norms.items():
            self.log.add(f"{name}.grad_norm", norm)
        optimizers.step(norms)
        self.average.update(self.step)
        self.step += 1
        self.num_samples += self._samples_per_step

    def _check(
        self,
        losses_of: dict[str, list[Tensor]],
        norms: dict[str, Tensor],
        stop: StopRequest,
        seen: list[Batch],
    ) -> None:
        """Stop all processes where one has a loss that training cannot go on from."""
        # One wait and one exchange a step, for all questions: are losses and gradients sound, has
        # someone asked to stop?
        values = [torch.stack(losses).mean() for losses in losses_of.values()]
        if self.accelerator.scaler is None:  # with fp16 the scaler skips what is not finite
            values += [norm.float() for norm in norms.values()]
        asked = torch.full_like(values[0], float(stop.is_asked))
        *figures, stopping = self.accelerator.reduce(torch.stack([*values, asked]), "mean").tolist()
        self.is_stopping = stopping > 0
        sound = all(math.isfinite(figure) for figure in figures)
        for network, value in zip(losses_of, figures, strict=False):
            mean = self.means.get(network, value)
            limit = self.config.max_loss_ratio * abs(mean)
            is_settling = self.step < _SETTLING_STEPS
            if not sound or not (is_settling or value <= limit):
                self._raise_divergence(network, value, mean, seen)
            self.means[network] = _MEAN_DECAY * mean + (1 - _MEAN_DECAY) * value

    def _raise_divergence(self, network: str, value: float, mean: float, seen: list[Batch]) -> None:
        before = self.state.latest()
        saved = self._save(name=f"failed_{self.step:08d}")
        indices = [int(i) for batch in seen for i in batch.indices]
        names = ", ".join(name for batch in seen for name in batch.names)
        start = "" if before is None else f" and model: {before}, the last state that was sound"
        raise TrainingError(
            f"the loss of {network} and its gradient must stay finite and below "
            f"{self.config.max_loss_ratio:g} times its running mean {mean:.4g}, got {value} at "
            f"step {self.step}, samples {indices} ({names}); the state before that step is in "
            f"{saved}. Start a new run (another output) with a lower learning rate, or bf16 in "
            f"place of fp16{start}; or raise max_loss_ratio, which this run may change"
        )

    def _raise_stop(self, stop: StopRequest) -> None:
        message = (
            f"stopped after step {self.step} of {self.config.steps}; saved in "
            f"{self.state.latest()}. The same run started again in {self.folder} goes on from there"
        )
        raise (Terminated if stop.signal == signal.SIGTERM else KeyboardInterrupt)(message)

    def _note_skipped(self, batch: Batch) -> None:
        self.num_skipped += len(batch.skipped)
        if self.accelerator.is_main_process:
            for reason in batch.skipped:
                self.log.write({"step": self.step, "skipped": reason})

    def _write_log(self, progress: Progress) -> None:
        means = self.log.means(self.accelerator)
        speed = self.log.speed(self._samples_per_step, self.step)
        figures = means | self.optimizers.learning_rates() | speed
        if self.accelerator.is_main_process:
            self.log.write({"step": self.step} | figures)
        main = next(iter(self.networks))
        progress.report(self.step, means[f"{main}.loss"], speed["steps_per_second"])
        if self.config.trackers:
            self.accelerator.log(figures, step=self.step)

    @torch.no_grad()
    def _validate(self) -> None:
        if self.accelerator.is_main_process:
            path = self.folder / "samples" / f"step_{self.step:08d}.png"
            with self.average.used():
                main = self._main_network.eval()
                self.metrics, picture = self.validator.run(
                    self.stage, self.accelerator.device, path
                )
                main.train()
            self.log.write({"step": self.step, "validation": self.metrics})
            if self.config.trackers:
                track_validation(self.accelerator, self.metrics, picture, self.step)
        self.accelerator.wait_for_everyone()
        if self.config.validation.keep_best is not None and self.step > 0:
            (self.metrics,) = broadcast_object_list([self.metrics])
            score = self.validator.score(self.metrics)
            if self.best is None or score > self.best:
                self.best = score
                self._save(name="best")

    def _save(self, *, name: str | None = None) -> Path:
        kept = {name: getattr(self, name) for name in sorted(_KEPT)}
        progress = {"config": asdict(self.config), "data": self.data.description, **kept}
        return self.state.save(self.step, progress, name=name)
