"""Count what a training step of the full-size model takes, without a GPU and without weights.

    python benchmarks/training_memory.py --out benchmarks/results/training_memory.json

The networks have Stable Diffusion 2.1-base's sizes, and torch's fake tensors take a whole step
(student forward and backward with LPIPS' VGG16, teacher, fake score) without computing anything;
every live byte is counted. Not counted: the CUDA context, the allocator's gaps, workspaces of
convolutions, and the text encoder, which is off the device by then.
"""

from __future__ import annotations

import argparse
import json
import weakref
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tadsr.networks.adapters import adapter_parameters, attach_new_adapters
from tadsr.networks.time_aware_vae import TimeAwareAutoencoderKL
from tadsr.schedule import make_alphas_cumprod
from tadsr.training.acceleration import keep_frozen_weights_in
from tadsr.training.losses import blurred_mse
from tadsr.training.student import OneStepStudent
from tadsr.training.vsd import diffusion_loss, guided_noise, vsd_loss

UNET = {
    "sample_size": 64,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 768,
}
VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)
"""Channels of its convolutions; 0 is a pooling."""


class LiveBytes(TorchDispatchMode):
    """Follow the bytes of tensors that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Count the storages of what an operation returns."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor)
        return out

    def count(self, tensor: torch.Tensor) -> None:
        """Take a tensor's storage in until it is dropped."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.seen:
            size = storage.nbytes()
            self.seen.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.drop, key, size)

    def drop(self, key: int, size: int) -> None:
        """Take a storage out."""
        self.seen.discard(key)
        self.live -= size


def perceptual_network() -> nn.Module:
    """VGG16's convolutions, frozen, whose features LPIPS compares."""
    layers, channels = [], 3
    for width in VGG16:
        layers.append(nn.Conv2d(channels, width, 3, padding=1) if width else nn.MaxPool2d(2))
        layers += [nn.ReLU()] if width else []
        channels = width or channels
    return nn.Sequential(*layers).requires_grad_(False)


def count_step(batch: int, *, checkpointing: bool, perceptual: bool, tavsd: bool, px: int) -> float:
    """Return the peak of a step in GiB: bf16 with float32 trained weights, rank 4."""
    with torch.device("meta"):
        vae, unet = TimeAwareAutoencoderKL(**VAE), UNet2DConditionModel(**UNET)
        student = OneStepStudent(vae, unet, None, make_alphas_cumprod()).requires_grad_(False)
        attach_new_adapters(unet, vae)
        teacher = UNet2DConditionModel(**UNET).requires_grad_(False) if tavsd else None
        if tavsd:
            attach_new_adapters(teacher, None)
        vgg = perceptual_network()
    for parameter in (p for m in (unet, vae) for p in adapter_parameters(m).values()):
        parameter.requires_grad_(True)
    networks = [m for m in (student, teacher) if m is not None]
    keep_frozen_weights_in(torch.bfloat16, *networks)
    for module in networks:
        module.train()
    if checkpointing:
        for module in (vae, unet, *([teacher] if tavsd else [])):
            module.enable_gradient_checkpointing()
    with FakeTensorMode(), LiveBytes() as memory:
        for module in (*networks, vgg):
            materialize(module)
        trained = [p for p in student.parameters() if p.requires_grad]
        fake_trained = [p for p in teacher.parameters() if p.requires_grad] if tavsd else []
        lq, hq = torch.zeros(batch, 3, px, px), torch.zeros(batch, 3, px, px)
        t = torch.zeros(batch, dtype=torch.int64)
        prompts = torch.zeros(batch, 77, 1024)
        noise = torch.zeros(batch, 4, px // 8, px // 8)
        memory.peak = memory.live

        def predict(noisy, timesteps):
            with torch.autocast("cpu", torch.bfloat16):
                return teacher(noisy, timesteps, prompts).sample

        # AdamW's moments of the steps before, which this one would find.
        memory.live += 8 * sum(p.numel() for p in (*trained, *fake_trained))
        with torch.autocast("cpu", torch.bfloat16):
            restored = student(lq, t, prompts)
        loss = blurred_mse(restored.image, hq, t).mean()
        if perceptual:
            with torch.no_grad():
                wanted = features(vgg, hq)
            pairs = zip(features(vgg, restored.image), wanted, strict=True)
            loss = loss + sum((a - b).square().mean() for a, b in pairs)
        if tavsd:
            guided = guided_noise(predict, predict, torch.ones(batch))
            args = (noise, t, make_alphas_cumprod(), guided, predict)
            loss = loss + vsd_loss(restored.pred_x0, *args).mean()
        latents = restored.pred_x0.detach()
        del restored
        loss.backward()
        if tavsd:
            diffusion_loss(predict, latents, noise, t, make_alphas_cumprod()).mean().backward()
        return memory.peak / 2**30


def materialize(module: nn.Module) -> None:
    """Give a module of the meta device fake weights on the CPU."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                part._parameters[name] = nn.Parameter(fake, parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def features(vgg: nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
    """Return normalised features after each ReLU before a pooling, as LPIPS has them."""
    found = []
    for i, layer in enumerate(vgg):
        image = layer(image)
        if i + 1 == len(vgg) or isinstance(vgg[i + 1], nn.MaxPool2d):
            found.append(image / image.square().sum(1, keepdim=True).add(1e-10).sqrt())
    return found


def main() -> None:
    """Count the recipes' settings and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 3, 6])
    options = parser.parse_args()
    rows = []
    for batch in options.batches:
        for checkpointing in (True, False):
            kind = {"checkpointing": checkpointing, "perceptual": True, "tavsd": True, "px": 512}
            rows.append({"batch": batch, **kind, "gib": round(count_step(batch, **kind), 1)})
            print(rows[-1], flush=True)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
