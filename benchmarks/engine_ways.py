"""The ways to run the full-size networks that engine.py measures, and what they run on."""

from __future__ import annotations

import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tadsr import TADSRPipeline
from tadsr.onestep import EnginePlan

TESTS_DATA = Path(__file__).parents[1] / "tests" / "data"
SCALE = 4
TIMESTEP = 500
MIN_REPEATS, MAX_REPEATS = 3, 30


def build_pipeline(device: str, dtype: torch.dtype, *, has_adapters: bool) -> Any:
    """Build the published model with random weights, the same at every call on a device."""
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from tadsr import TimeAwareAutoencoderKL
    from tadsr.networks.adapters import attach_new_adapters, fuse_adapters

    configs = json.loads((TESTS_DATA / "official_layout.json").read_text("utf-8"))["configs"]
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(configs["unet"])
        vae = TimeAwareAutoencoderKL.from_config(configs["time_vae"])
        text = CLIPTextModel(CLIPTextConfig.from_dict(configs["text_encoder"]))
    generator = torch.Generator(device).manual_seed(0)
    for network in (unet, vae, text):
        network.to_empty(device=device).eval().requires_grad_(False)
        fill(network, generator)
    torch.manual_seed(0)
    attach_new_adapters(unet, vae)
    for network in (unet, vae):
        for name, values in network.named_parameters():
            if "lora_" in name:
                values.requires_grad_(False).normal_(0, 0.02, generator=generator)
    if not has_adapters:
        fuse_adapters(unet, vae)
    pipe = TADSRPipeline(
        vae,
        unet,
        DDPMScheduler.from_config(configs["scheduler"]),
        text,
        CLIPTokenizer.from_pretrained(TESTS_DATA / "golden" / "base" / "tokenizer"),
    )
    return pipe.to(device, dtype)


def fill(network: nn.Module, generator: torch.Generator) -> None:
    """Draw weights that keep activations near 1 through the whole network."""
    for name, values in network.named_parameters():
        if values.ndim > 1:
            fan_in = values[0].numel()
            values.normal_(0, fan_in**-0.5, generator=generator)
        else:
            is_scale = "norm" in name and name.endswith("weight")
            values.normal_(float(is_scale), 0.1, generator=generator)
    for name, values in network.named_buffers():
        if name.endswith("position_ids"):
            values.copy_(torch.arange(values.shape[-1], device=values.device))


def make_photos(batch: int, side_px: int) -> list[Image.Image]:
    """Draw LQ photos: coarse shapes with noise, as a smooth one would hide errors."""
    random = np.random.default_rng(side_px)
    small = side_px // SCALE
    photos = []
    for _ in range(batch):
        coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8))
        shapes = np.asarray(coarse.resize((small, small), Image.Resampling.BICUBIC), np.int16)
        noisy = shapes + random.integers(-12, 13, shapes.shape, np.int16)
        photos.append(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)))
    return photos


def as_published(pipe: Any, photos: list[Image.Image]) -> list[Image.Image]:
    """Restore as the published code does: one after the other, host work on the host."""
    from tadsr.color import adain_color_fix

    results = []
    for photo in photos:
        size = (photo.width * SCALE, photo.height * SCALE)
        lq = photo.resize(size, Image.Resampling.BICUBIC)
        x = torch.from_numpy(np.array(lq)).permute(2, 0, 1)[None].float() / 127.5 - 1
        pipe._text_embeddings.clear()  # it encodes the prompt of every image
        embeds = pipe.encode_prompt([""])
        timesteps = torch.tensor([TIMESTEP], device=pipe.unet.device)
        image = pipe.restore(x.to(pipe.unet.device, pipe.unet.dtype), timesteps, embeds)
        image = (image.float().cpu() / 2 + 0.5).clamp(0, 1)
        image = image.mul(255).round() / 255  # through an 8-bit picture
        fixed = adain_color_fix(image, x / 2 + 0.5).clamp(0, 1)
        pixels = fixed[0].mul(255).round().byte().permute(1, 2, 0)
        results.append(Image.fromarray(pixels.numpy()))
    return results


class Way:
    """A way to run the networks, loaded on a device.

    Args:
        name: One of `WAYS`.
        device: What torch calls it.
        dtype: Type of the weights.
        model: What `TADSRPipeline.from_pretrained` loads; None for random weights of full size.
    """

    def __init__(self, name: str, device: str, dtype: torch.dtype, model: str | None) -> None:
        self.name = name
        self.is_cuda = device != "cpu"
        self.num_calls = 0
        if model is None:
            self.pipe = build_pipeline(device, dtype, has_adapters=name == "published")
        else:
            self.pipe = TADSRPipeline.from_pretrained(model, torch_dtype=dtype).to(device)
        engines = {"published": "eager", "fused": "fused"}
        self.pipe.set_engine(engines.get(name, name))

    def __call__(self, photos: list[Image.Image]) -> list[Image.Image]:
        """Restore photos, pictures in and pictures out."""
        self.num_calls += 1
        if self.name == "published":
            return as_published(self.pipe, photos)
        return self.pipe(photos, timestep=TIMESTEP)

    @torch.no_grad()
    def stages(self, photos: list[Image.Image]) -> dict[str, Callable[[], Tensor]]:
        """Return the three networks, each with its input computed before."""
        engine = self.pipe.engine
        size = (photos[0].width * SCALE, photos[0].height * SCALE)
        pixels = np.stack([np.asarray(photo.resize(size)) for photo in photos])
        # In the layout that a call has.
        lq = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
        lq = lq.to(self.pipe.unet.device, self.pipe.unet.dtype)
        timesteps = torch.full((len(photos),), TIMESTEP, device=lq.device)
        embeds = self.pipe.encode_prompt([""] * len(photos))
        latents = engine.encode(lq, timesteps)
        pred_x0 = engine.predict_x0(latents, timesteps, embeds)
        return {
            "encoder": lambda: engine.encode(lq, timesteps),
            "unet": lambda: engine.predict_x0(latents, timesteps, embeds),
            "decoder": lambda: engine.stages.decode(pred_x0).values,
        }

    @torch.no_grad()
    def picture(self, photo: Image.Image) -> np.ndarray:
        """Return the networks' result for a photo, float64, not rounded and not clamped."""
        stages = self.stages([photo])
        return stages["decoder"]().double().cpu().numpy()

    @torch.no_grad()
    def seconds(self, run: Callable[[], object], most: float, repeats: int | None = None) -> float:
        """Return the median time of a call until the device has done it.

        Args:
            most: Seconds for all repetitions.
            repeats: A fixed number of repetitions; None takes those that fit.
        """
        times: list[float] = []
        while len(times) < (repeats or MIN_REPEATS) or (
            repeats is None and len(times) < MAX_REPEATS and sum(times) < most
        ):
            self.wait()
            begin = time.perf_counter()
            run()
            self.wait()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)

    def records(self, batch: int, side_px: int) -> bool:
        """Tell whether graphs are recorded for a shape that comes often."""
        pixels = batch * side_px * side_px
        return self.is_cuda and self.name == "fused" and pixels <= EnginePlan.max_graphed_pixels

    def wait(self) -> None:
        """Wait for the device."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def peak_gib(self) -> float:
        """Return the device's peak memory since the last reset; the process's own on a CPU."""
        if self.is_cuda:
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
