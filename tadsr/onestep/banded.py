"""Large images: restored in bounded memory, and handed out in strips from top to bottom."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from tadsr.color import match_moments, wavelet_color_fix, wavelet_reach_px
from tadsr.conditioning import TimestepField, run_at
from tadsr.config import UpscaleSettings
from tadsr.errors import TADSRError, TADSRWarning, not_finite
from tadsr.images import pad_reflect, reflect_index, resize_bicubic_rows
from tadsr.networks.time_aware_vae import TimeAwareAutoencoderKL
from tadsr.onestep.activations import ComputedActivation, StoredActivation
from tadsr.onestep.banded_autoencoder import decode_in_bands, encode_in_bands
from tadsr.onestep.banded_layers import Bands
from tadsr.onestep.banded_unet import predict_in_bands
from tadsr.onestep.memory import available_bytes, is_out_of_memory, used_bytes
from tadsr.onestep.offloading import weights_in_place
from tadsr.onestep.statistics import ChannelStatistics
from tadsr.onestep.storage import BandStorage, PlannedStorage
from tadsr.onestep.tile_spec import MIN_BAND_BYTES, TileSpec
from tadsr.progress import Progress
from tadsr.schedule import residual_to_x0

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
_PLANNED_BYTES: WeakKeyDictionary[UNet2DConditionModel, OrderedDict[Any, int]] = WeakKeyDictionary()
_MAX_PLANNED = 64
_OUTPUT_BYTES_PER_PIXEL = 4
"""Where the strips come together."""

Strip = tuple[int, Tensor]
"""First row, and (B, 3, rows, W): float32 in [0, 1], or bytes where they were asked for."""


@dataclass(frozen=True, eq=False)
class OneStep:
    """The networks and what conditions them.

    Args:
        vae: Time-aware autoencoder.
        unet: One-step student.
        alphas_cumprod: ᾱ, (T,).
        timesteps: One per image, (B,), int64, on the device; or a map per image.
        prompt_embeds: (B, L, D).
        generator: Samples the posterior; None takes its mean.
    """

    vae: TimeAwareAutoencoderKL
    unet: UNet2DConditionModel
    alphas_cumprod: Tensor
    timesteps: Tensor | TimestepField
    prompt_embeds: Tensor
    generator: torch.Generator | None = None

    def mix(
        self, results: Sequence[Tensor], size: tuple[int, int], rows: tuple[int, int] | None = None
    ) -> Tensor:
        """Mix results by maps, as `TimestepField.mix`; without maps return the only one."""
        if isinstance(self.timesteps, TimestepField):
            return self.timesteps.mix(results, size, rows)
        return results[0]


def upscale_in_strips(
    model: OneStep,
    rgb: Tensor,
    settings: UpscaleSettings,
    spec: TileSpec,
    progress: Progress | None = None,
) -> Iterator[Strip]:
    """Restore and enlarge images with the result of the untiled computation.

    Args:
        model: Networks and conditions, on one device.
        rgb: Images, (B, 3, h, w), in [0, 1]; or one for all timesteps. A fourth channel is alpha,
            by which adain weighs pixels.
        settings: Scale and colour fix; the size that the network works at must be the output's.
        spec: Sizes of the pieces, and the memory to stay within.
        progress: Called at every piece with the share done.

    Yields:
        Strips from top to bottom. All computation but the colour fix is done before the first.

    Raises:
        TADSRError: The result is not finite at the model's precision, or no memory is left even
            for the smallest pieces.
    """
    run = _Run(model, rgb, settings, progress)
    restored = run.restore(spec)
    try:
        yield from run.strips(restored)
    finally:
        for one in restored:
            one.pixels.free()


def planned_bytes(model: OneStep, rgb: Tensor, settings: UpscaleSettings) -> int:
    """Return what bands keep between layers at the most; counted once for a size.

    Args:
        model: As for `upscale_in_strips`.
        rgb: As for `upscale_in_strips`.
        settings: As for `upscale_in_strips`.
    """
    # Counting walks through every layer, which takes longer than a GPU computes a small image.
    known = _PLANNED_BYTES.setdefault(model.unet, OrderedDict())
    is_map = isinstance(model.timesteps, TimestepField)
    num_runs = len(model.timesteps.knots) if is_map else 1
    batch = len(model.prompt_embeds)
    size = settings.output_size(*rgb.shape[-2:])
    key = (id(model.vae), model.vae.dtype, batch, num_runs, *size)
    if key not in known:
        plan = PlannedStorage(model.timesteps.device)
        _Run(model, rgb, settings, None).compute(Bands(plan, MIN_BAND_BYTES), 0)
        known[key] = plan.peak_bytes
        if len(known) > _MAX_PLANNED:
            known.popitem(last=False)
    return known[key]


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

    def __init__(
        self,
        model: OneStep,
        rgb: Tensor,
        settings: UpscaleSettings,
        progress: Progress | None,
    ) -> None:
        self.model = model
        self.device = model.timesteps.device
        images = rgb.to(self.device).expand(len(model.prompt_embeds), -1, -1, -1)
        self.rgb = images[:, :3]
        self.alpha = images[:, 3:] if images.shape[1] == 4 else None
        self.settings = settings
        self.progress = progress
        self.size = settings.output_size(*rgb.shape[-2:])
        factor = model.vae.downscale_factor
        self.padded = tuple(side + -side % factor for side in self.size)

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
            if self.progress is not None:
                self.progress(done / total)

        while True:
            done = 0

            limit = min(enough, self._buffer_bytes(spec, band_bytes))
            host = min(enough, int(_SHARE_OF_AVAILABLE * available_bytes(torch.device("cpu"))))
            try:
                storage = BandStorage(self.device, device_bytes=limit, host_bytes=host)
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

    def strips(self, restored: Sequence[_Restored]) -> Iterator[Strip]:
        """Apply the colour fix, and mix by maps."""
        height, width = self.size
        rows = max(1, STRIP_PIXELS // width)
        for start in range(0, height, rows):
            stop = min(start + rows, height)
            fixed = [self._fix_color(one, start, stop).clamp_(0, 1) for one in restored]
            yield start, self.model.mix(fixed, self.size, (start, stop))

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
        model = self.model
        return run_at(
            model.timesteps, lambda t: self._compute_at(t, bands, attention_px), model.generator
        )

    def _compute_at(self, timesteps: Tensor, bands: Bands, attention_px: int) -> _Restored:
        model, vae = self.model, self.model.vae
        batch = self.rgb.shape[0]
        dtype = vae.dtype
        image = ComputedActivation((batch, 3, *self.padded), dtype, self._padded_rows)
        prompts = model.prompt_embeds.to(model.unet.dtype)
        side = attention_px // vae.downscale_factor
        latents = self._encode(bands, image, timesteps).to(model.unet.dtype)
        with _brought(model.unet, bands):
            residual = predict_in_bands(
                bands, model.unet, latents, timesteps, prompts, attention_side=side
            )
        pred_x0 = residual_to_x0(latents, residual, timesteps, model.alphas_cumprod)
        restored = bands.storage.allocate((batch, 3, *self.size), dtype)
        restored.begin(with_statistics=False)
        moments = tuple(ChannelStatistics(batch, 3, self.device) for _ in range(2))

        def emit(start: int, rows: Tensor) -> None:
            stop = min(start + rows.shape[2], self.size[0])
            if stop <= start:
                return
            rows = rows[:, :, : stop - start, : self.size[1]]
            if not torch.isfinite(rows).all():
                raise not_finite(model.unet.dtype)
            rows = rows.clamp(-1, 1)
            restored.write(start, rows)
            if self.settings.color_fix == "adain":
                weights = None
                if self.alpha is not None:
                    weights = resize_bicubic_rows(self.alpha, self.size, start, stop).clamp(0, 1)
                moments[0].add(rows.float() / 2 + 0.5, weights)
                moments[1].add(self._reference_rows(start, stop), weights)

        with _brought(vae, bands):
            decode_in_bands(bands, vae, pred_x0.to(dtype) / vae.config.scaling_factor, emit)
        return _Restored(restored, moments)

    def _encode(self, bands: Bands, image: ComputedActivation, timesteps: Tensor) -> Tensor:
        vae, generator = self.model.vae, self.model.generator
        with _brought(vae, bands):
            moments = encode_in_bands(bands, vae, image, timesteps)
        if bands.is_plan:
            batch, _, height, width = image.shape
            factor = vae.downscale_factor
            shape = (batch, vae.config.latent_channels, height // factor, width // factor)
            return torch.zeros(1, dtype=image.dtype, device=self.device).expand(shape)
        posterior = DiagonalGaussianDistribution(moments)
        latents = posterior.mode() if generator is None else posterior.sample(generator)
        return latents * vae.config.scaling_factor

    def _reference_rows(self, start: int, stop: int) -> Tensor:
        """Return rows of the enlarged LQ, (B, 3, rows, W), in [0, 1], float32."""
        return resize_bicubic_rows(self.rgb, self.size, start, stop).clamp(0, 1)

    def _padded_rows(self, start: int, stop: int) -> Tensor:
        """Return rows of what the encoder sees."""
        index = reflect_index(start, stop, self.size[0])
        first = int(index.min())
        rows = self._reference_rows(first, int(index.max()) + 1)
        if stop > self.size[0]:
            rows = rows.index_select(2, (index - first).to(rows.device))
        rows = pad_reflect(rows, 0, self.padded[1] - self.size[1])
        return (rows * 2 - 1).to(self.model.vae.dtype)

    def _fix_color(self, restored: _Restored, start: int, stop: int) -> Tensor:
        def rows(first: int, last: int) -> Tensor:
            return restored.pixels.read(first, last).float().div_(2).add_(0.5)

        if self.settings.color_fix == "adain":
            image, reference = ((m.mean, m.variance(correction=1)) for m in restored.moments)
            return match_moments(rows(start, stop), image, reference)
        if self.settings.color_fix == "wavelet":
            reach = wavelet_reach_px()
            first, last = max(0, start - reach), min(self.size[0], stop + reach)
            fixed = wavelet_color_fix(rows(first, last), self._reference_rows(first, last))
            return fixed[:, :, start - first : stop - first]
        return rows(start, stop)


def _brought(network: nn.Module, bands: Bands) -> AbstractContextManager[None]:
    """Bring a network's offloaded weights, as only a call of the network itself would."""
    return nullcontext() if bands.is_plan else weights_in_place(network)
