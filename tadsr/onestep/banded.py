"""Large images: restored in bounded memory, and handed out in strips from top to bottom."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tadsr.color import match_moments, wavelet_color_fix, wavelet_reach_px
from tadsr.conditioning import TimestepField, run_at
from tadsr.errors import TADSRError, TADSRWarning
from tadsr.images import pad_reflect, reflect_index, resize_bicubic_rows
from tadsr.networks import walk
from tadsr.onestep.activations import (
    Activation,
    ChannelStatistics,
    ComputedActivation,
    StoredActivation,
    by_rows,
)
from tadsr.onestep.banded_layers import Bands
from tadsr.onestep.banded_walk import BandedLayers
from tadsr.onestep.selfcheck import CROP_PX
from tadsr.onestep.stages import Checked, checked
from tadsr.onestep.step import OneStepEngine
from tadsr.onestep.storage import BandStorage, PlannedStorage
from tadsr.onestep.support import check_unet, weights_in_place
from tadsr.onestep.tasks import Task, available_bytes, is_out_of_memory, used_bytes
from tadsr.prompts import Prompts
from tadsr.schedule import residual_to_x0
from tadsr.tile_spec import MIN_BAND_BYTES, TileSpec

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from tadsr.networks.time_aware_vae import TimeAwareAutoencoderKL

STRIP_PIXELS = 2**19
"""Pixels of a strip that is handed out, about."""
_SHARE_OF_AVAILABLE = 0.7
_FRAGMENTATION = 2
"""Room over what lies in it at once, for parts to find a place in."""
_BANDS_AT_ONCE = 6
"""Working sets that may be alive together, with what convolutions need inside."""
_SCRATCH_BYTES = 2**26
"""What convolutions and allocators take beside what they are asked for, whatever the size."""
_STRIP_BYTES = 8 * 12 * STRIP_PIXELS
"""Copies of a strip while its colours are fixed."""
_OUTPUT_BYTES_PER_PIXEL = 4
"""Where the strips come together."""

Strip = tuple[int, Tensor]
"""First row, and (B, 3, rows, W): float32 in [0, 1], or bytes where they were asked for."""


def upscale_in_strips(engine: OneStepEngine, task: Task, spec: TileSpec) -> Iterator[Strip]:
    """Restore and enlarge images with the result of the untiled computation."""
    check_unet(engine.unet)
    engine.need_modules()
    run = _Run(engine, task)
    restored = run.restore(spec)
    try:
        yield from run.strips(restored)
    finally:
        for one in restored:
            one.pixels.free()


def count_kept_bytes(engine: OneStepEngine, task: Task) -> int:
    """Return what bands keep between layers at the most, or raise as `check_unet` does."""
    check_unet(engine.unet)
    plan = PlannedStorage(task.device)
    _Run(engine, task).compute(Bands(plan, MIN_BAND_BYTES), 0)
    return plan.peak_bytes


@dataclass(frozen=True, eq=False)
class _Restored:
    """Images before the colour fix.

    Args:
        pixels: In [-1, 1], at the output size.
        moments: Of the images and of their reference.
    """

    pixels: StoredActivation
    moments: tuple[ChannelStatistics, ChannelStatistics]


class _Run:
    """One pass over images; the reference is computed anew wherever it is needed."""

    def __init__(self, engine: OneStepEngine, task: Task) -> None:
        self.engine = engine
        self.task = task
        self.device = task.device
        rgb = task.rgb.to(self.device).expand(task.batch, -1, -1, -1)
        self.rgb, self.alpha = rgb[:, :3], rgb[:, 3:] if rgb.shape[1] == 4 else None
        self.settings = task.settings
        self.size = task.output_size
        self.padded = tuple(side + -side % engine.downscale_factor for side in self.size)

    def restore(self, spec: TileSpec) -> list[_Restored]:
        """Return the restored images, once for every knot of maps."""
        band_bytes = spec.band_bytes_on(self.device.type)
        attention_px = spec.attention_px_for(*self.size)
        work: list[int] = []
        plan = PlannedStorage(self.device)
        self.compute(Bands(plan, band_bytes, work.append), attention_px)
        total = sum(work)
        # More would only be asked for, and refused where memory is counted when it is asked for.
        enough = _FRAGMENTATION * plan.peak_bytes

        def tick(multiplications: int) -> None:
            nonlocal done
            done += multiplications
            if self.task.progress is not None:
                self.task.progress(min(1.0, done / total))  # what is done again goes beyond

        uses_kernels = self._trusts_kernels()
        while True:
            done = 0
            limit = min(enough, self._buffer_bytes(spec, band_bytes))
            host = min(enough, int(_SHARE_OF_AVAILABLE * available_bytes(torch.device("cpu"))))
            try:
                storage = BandStorage(
                    self.device, device_bytes=limit, host_bytes=host, uses_kernels=uses_kernels
                )
                return self.compute(Bands(storage, band_bytes, tick), attention_px)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if band_bytes <= MIN_BAND_BYTES:
                    raise TADSRError(
                        "memory must suffice for the model and some rows of the image, but ran "
                        f"out at {spec}; use a smaller scale, a half-precision model, or the CPU"
                    ) from error
            smaller = max(MIN_BAND_BYTES, band_bytes // 4)
            warnings.warn(
                f"memory ran out with bands of {band_bytes} bytes; trying {smaller}, and half as "
                "much kept between layers. A TileSpec with these values, or --max-memory, avoids "
                "the first try",
                TADSRWarning,
                stacklevel=5,
            )
            band_bytes = smaller
            spec = replace(spec, max_memory=max(1, (limit + used_bytes(self.device)) // 2))
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _trusts_kernels(self) -> bool:
        if self.device.type != "cuda":
            return False
        given = self.task
        side = min(CROP_PX, *self.padded)
        crop = self.padded_rows(0, side)[:1, :, :, :side].to(self.engine.vae.dtype)
        timesteps = given.timesteps
        timesteps = timesteps.knots[0] if isinstance(timesteps, TimestepField) else timesteps
        return self.engine.trusts_kernels(crop, timesteps[:1], given.prompts[:1])

    def strips(self, restored: Sequence[_Restored]) -> Iterator[Strip]:
        """Apply the colour fix, and mix by maps."""
        height, width = self.size
        rows = max(1, STRIP_PIXELS // width)
        for start in range(0, height, rows):
            stop = min(start + rows, height)
            fixed = [self._fix_color(one, start, stop).clamp_(0, 1) for one in restored]
            yield start, self.task.mix(fixed, self.size, (start, stop))

    def _buffer_bytes(self, spec: TileSpec, band_bytes: int) -> int:
        if spec.max_memory is None:
            room = int(_SHARE_OF_AVAILABLE * available_bytes(self.device))
        else:
            room = spec.max_memory - used_bytes(self.device)
        height, width = self.size
        output = _OUTPUT_BYTES_PER_PIXEL * self.rgb.shape[0] * height * width
        working = _BANDS_AT_ONCE * band_bytes + _STRIP_BYTES + _SCRATCH_BYTES
        return max(0, room - output - working)

    def compute(self, bands: Bands, attention_px: int) -> list[_Restored]:
        """Run all networks; with a plan, count only."""
        given, engine = self.task, self.engine
        generator = None if bands.is_plan else given.generator
        stages = BandedStages(self, bands, attention_px, engine.vae, engine.unet)

        def take(timesteps: Sequence[int]) -> _Restored:
            restored = engine.take(stages, self, timesteps, given.prompts, generator)
            while stages.held:
                stages.held.pop().free()
            return restored

        return run_at(given.timesteps, take, generator)

    def reference_rows(self, start: int, stop: int) -> Tensor:
        """Return rows of the enlarged LQ, (B, 3, rows, W), in [0, 1], float32."""
        return resize_bicubic_rows(self.rgb, self.size, start, stop).clamp(0, 1)

    def weight_rows(self, start: int, stop: int) -> Tensor | None:
        """Return rows of the enlarged alpha, (B, 1, rows, W); None for an opaque image."""
        if self.alpha is None:
            return None
        return resize_bicubic_rows(self.alpha, self.size, start, stop).clamp(0, 1)

    def padded_rows(self, start: int, stop: int) -> Tensor:
        """Return rows of what the encoder sees, float32."""
        index = reflect_index(start, stop, self.size[0])
        first = int(index.min())
        rows = self.reference_rows(first, int(index.max()) + 1)
        if stop > self.size[0]:
            rows = rows.index_select(2, (index - first).to(rows.device))
        rows = pad_reflect(rows, 0, self.padded[1] - self.size[1])
        return rows * 2 - 1

    def _fix_color(self, restored: _Restored, start: int, stop: int) -> Tensor:
        def rows(first: int, last: int) -> Tensor:
            return restored.pixels.read(first, last).float().div_(2).add_(0.5)

        if self.settings.color_fix == "adain":
            image, reference = ((m.mean, m.variance(correction=1)) for m in restored.moments)
            return match_moments(rows(start, stop), image, reference)
        if self.settings.color_fix == "wavelet":
            reach = wavelet_reach_px()
            first, last = max(0, start - reach), min(self.size[0], stop + reach)
            fixed = wavelet_color_fix(rows(first, last), self.reference_rows(first, last))
            return fixed[:, :, start - first : stop - first]
        return rows(start, stop)


class BandedStages:
    """The three networks in bands, as `OneStepEngine.take` runs them."""

    # What follows takes long, so an overflow is not carried through it.
    checks_each = True

    def __init__(
        self,
        run: _Run,
        bands: Bands,
        attention_px: int,
        vae: TimeAwareAutoencoderKL,
        unet: UNet2DConditionModel,
    ) -> None:
        self.run = run
        self.bands = bands
        self.attention_px = attention_px
        self.vae = vae
        self.unet = unet
        self.held: list[StoredActivation] = []
        """Latents, which are free to be given up once there are images."""

    def of(self, vae: TimeAwareAutoencoderKL, unet: UNet2DConditionModel) -> BandedStages:
        """Return the stages of other networks."""
        others = BandedStages(self.run, self.bands, self.attention_px, vae, unet)
        others.held = self.held
        return others

    def encode(self, lq: _Run, timesteps: Sequence[int]) -> Checked:
        """Encode the images of a run to the posterior's moments."""
        vae, dtype = self.vae, self.vae.dtype
        image = ComputedActivation(
            (len(lq.rgb), 3, *lq.padded),
            dtype,
            lq.device,
            lambda start, stop: lq.padded_rows(start, stop).to(dtype),
        )
        with self._brought(vae):
            temb = None
            if not self.bands.is_plan:
                timesteps = torch.tensor(timesteps, device=lq.device)
                temb = vae.encoder.embed_timesteps(timesteps, dtype)
            return self._kept(walk.encode(BandedLayers(self.bands, temb), vae, image))

    def predict_x0(
        self, latents: Activation, timesteps: Sequence[int], prompts: Prompts
    ) -> Checked:
        """Take the student's step on scaled latents (B, C, h, w)."""
        unet, embeds = self.unet, prompts.embeds.to(self.unet.dtype)
        latents = by_rows(lambda rows: rows.to(unet.dtype), latents, dtype=unet.dtype)
        timesteps = torch.tensor(timesteps, device=embeds.device)
        with self._brought(unet):
            temb = None
            if not self.bands.is_plan:
                temb = unet.time_embedding(unet.get_time_embed(sample=embeds, timestep=timesteps))
            side = self.attention_px // self.vae.downscale_factor
            layers = BandedLayers(self.bands, temb, embeds, attention_side=side)
            residual = walk.predict(layers, unet, latents)
        alphas_cumprod = self.run.engine.alphas_cumprod
        pred_x0 = by_rows(
            lambda z, r: residual_to_x0(z, r, timesteps, alphas_cumprod), latents, residual
        )
        return self._kept(residual, pred_x0)

    def decode(self, pred_x0: Activation) -> Checked:
        """Decode scaled latents to images that wait for their colours."""
        run, vae, dtype = self.run, self.vae, self.vae.dtype
        batch, height = pred_x0.shape[0], run.size[0]
        restored = self.bands.storage.allocate((batch, 3, *run.size), dtype)
        restored.begin(with_statistics=False)
        moments = tuple(ChannelStatistics(batch, 3, run.device) for _ in range(2))
        largest = self._nothing_yet()

        def emit(start: int, rows: Tensor) -> None:
            stop = min(start + rows.shape[2], height)
            if stop <= start:
                return
            rows = rows[:, :, : stop - start, : run.size[1]]
            torch.maximum(largest, checked(rows).largest, out=largest)
            rows = rows.clamp(-1, 1)
            restored.write(start, rows)
            if run.settings.color_fix == "adain":
                weights = run.weight_rows(start, stop)
                moments[0].add(rows.float() / 2 + 0.5, weights)
                moments[1].add(run.reference_rows(start, stop), weights)

        with self._brought(vae):
            scale = vae.config.scaling_factor
            z = by_rows(lambda rows: rows.to(dtype) / scale, pred_x0, dtype=dtype)
            walk.decode(BandedLayers(self.bands, emit=emit), vae, z)
        if not self.bands.is_plan and not largest < torch.inf:
            restored.free()
        return Checked(_Restored(restored, moments), largest)

    def _kept(self, target: StoredActivation, source: Activation | None = None) -> Checked:
        """Keep latents for the networks that follow, with their largest magnitude.

        Args:
            source: What is written into the target; None for what it holds.
        """
        batch, channels, height, width = target.shape
        largest = self._nothing_yet()
        row_bytes = batch * channels * width * target.dtype.itemsize
        if source is not None:
            target.begin(with_statistics=False)  # nothing normalises them
        for start, stop in self.bands.split(height, row_bytes, 0):
            rows = target.view(start, stop) if source is None else source.read(start, stop)
            torch.maximum(largest, checked(rows).largest, out=largest)
            if source is not None:
                target.write(start, rows)
        if not self.bands.is_plan and not largest < torch.inf:
            target.free()
        else:
            self.held.append(target)
        return Checked(target, largest)

    def _nothing_yet(self) -> Tensor:
        """Return a largest magnitude to begin with; a plan's device may hold no numbers."""
        return torch.zeros((), device="cpu" if self.bands.is_plan else self.run.device)

    def _brought(self, network: nn.Module) -> AbstractContextManager[None]:
        """Bring a network's offloaded weights, as only a call of the network itself would."""
        return nullcontext() if self.bands.is_plan else weights_in_place(network)
