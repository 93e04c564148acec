"""What `inherit.py` trains, and what it trains against."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from inherit_samples import HeldOut
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from tadsr.checkpoints.base import build_networks
from tadsr.checkpoints.checkpoint import Checkpoint
from tadsr.measure.perceptual import SqueezeNetDistance
from tadsr.schedule import make_alphas_cumprod
from tadsr.training.data import upsample_lq
from tadsr.training.losses import LEAK, PatchDiscriminator
from tadsr.training.student import OneStepStudent

SCALE = 4
SMALL_LATENTS = 0.1
"""At large timesteps one step multiplies the encoder's latents by up to 15, and its UNet takes that
away again; the less there is of it, the less precision is lost."""
_AT_ONCE = 4


class DenseBlock(nn.Module):
    """Five convolutions, each of which sees what all before it have made."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        for i in range(5):
            out_channels = growth if i < 4 else width
            conv = nn.Conv2d(width + i * growth, out_channels, 3, padding=1)
            self.add_module(f"conv{i + 1}", conv)

    def forward(self, x: Tensor) -> Tensor:
        """Add to features (B, C, h, w)."""
        seen = x
        for i in range(1, 5):
            seen = torch.cat([seen, F.leaky_relu(getattr(self, f"conv{i}")(seen), LEAK)], dim=1)
        return x + 0.2 * self.conv5(seen)


class Block(nn.Module):
    """Three dense blocks in turn."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        for i in range(1, 4):
            self.add_module(f"rdb{i}", DenseBlock(width, growth))

    def forward(self, x: Tensor) -> Tensor:
        """Add to features (B, C, h, w)."""
        return x + 0.2 * self.rdb3(self.rdb2(self.rdb1(x)))


class Restorer(nn.Module):
    """RealESRGAN_x4plus, cut where its features at the LQ's resolution become a picture.

    Source: ESRGAN (arXiv 1809.00219); tensors are named as in the released weights.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        tensors = load_file(path)
        self.width = len(tensors["conv_first.weight"])
        growth = len(tensors["body.0.rdb1.conv1.weight"])
        count = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("body."))
        self.conv_first = nn.Conv2d(3, self.width, 3, padding=1)
        self.body = nn.Sequential(*(Block(self.width, growth) for _ in range(count)))
        for name in ("conv_body", "conv_up1", "conv_up2", "conv_hr"):
            self.add_module(name, nn.Conv2d(self.width, self.width, 3, padding=1))
        self.conv_last = nn.Conv2d(self.width, 3, 3, padding=1)
        self.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        self.requires_grad_(False).eval()

    def features(self, lq: Tensor) -> Tensor:
        """Return what it knows of LQ images (B, 3, h, w) in [-1, 1], (B, C, h, w)."""
        first = self.conv_first((lq / 2 + 0.5).to(self.conv_first.weight.dtype))
        return first + self.conv_body(self.body(first))

    def draw(self, features: Tensor) -> Tensor:
        """Return its pictures (B, 3, 4·h, 4·w), in [-1, 1]."""
        x = features
        for conv in (self.conv_up1, self.conv_up2):
            x = F.leaky_relu(conv(F.interpolate(x, scale_factor=2)), LEAK)
        x = self.conv_last(F.leaky_relu(self.conv_hr(x), LEAK))
        return x.float().clamp(0, 1) * 2 - 1


class NarrowNorm(nn.GroupNorm):
    """Normalise in the activations' own type, where autocast would widen them to float32.

    Sums are float32 all the same, and half as much is written to memory.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise activations (B, C, h, w)."""
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)

    @staticmethod
    def put_into(network: nn.Module) -> None:
        """Replace a network's normalisations; their parameters stay where they were."""
        for parent in list(network.modules()):
            for name, norm in list(parent.named_children()):
                if type(norm) is nn.GroupNorm:
                    narrow = NarrowNorm(norm.num_groups, norm.num_channels, norm.eps)
                    narrow.weight, narrow.bias = norm.weight, norm.bias
                    setattr(parent, name, narrow)


def build_student(path: str | Path, seed: int) -> tuple[Checkpoint, OneStepStudent]:
    """Build the networks that a YAML file describes, at random weights, as one module."""
    checkpoint = build_networks(path, seed)
    with torch.no_grad():
        means = checkpoint.vae.config.latent_channels
        checkpoint.vae.quant_conv.weight[:means] *= SMALL_LATENTS
        checkpoint.vae.quant_conv.bias[:means] *= SMALL_LATENTS
        checkpoint.unet.conv_in.weight /= SMALL_LATENTS
    for network in (checkpoint.vae, checkpoint.unet):
        NarrowNorm.put_into(network)
    config = checkpoint.scheduler.config
    alphas = make_alphas_cumprod(config.beta_start, config.beta_end, config.beta_schedule)
    student = OneStepStudent(checkpoint.vae, checkpoint.unet, checkpoint.prompt_embeddings, alphas)
    return checkpoint, student


@dataclass
class Setting:
    """What stages share."""

    student: OneStepStudent
    restorer: Restorer
    perceptual: SqueezeNetDistance
    held_out: HeldOut
    device: torch.device
    precision: torch.dtype | None
    rates: dict[str, float]
    """Largest learning rates of the stages."""
    seed: int
    faithful_share: float = 0.0
    """Of samples, beside those that fall there by chance, with a timestep near 0."""
    is_recorded: bool = False
    """Whether steps are recorded as CUDA graphs."""
    whitening: list[Tensor] = field(default_factory=list)
    """Mean and standard deviation of the restorer's features, each (1, C, 1, 1); none at first."""

    def autocast(self) -> AbstractContextManager:
        """Compute in the run's precision."""
        if self.precision is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.precision)

    def restorer_autocast(self) -> AbstractContextManager:
        """Compute as the restorer does: in the precision of its weights on a GPU."""
        return nullcontext() if self.device.type == "cuda" else self.autocast()

    @cached_property
    @torch.no_grad()
    def judged(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Originals and LQ that are held out, with the restorer's features and pictures."""
        pairs = (self.held_out.hq.split(_AT_ONCE), self.held_out.lq.split(_AT_ONCE))
        found = []
        for hq, lq in zip(*pairs, strict=True):
            hq, lq = hq.to(self.device), lq.to(self.device)
            with self.restorer_autocast():
                features = self.restorer.features(lq)
                found.append((hq, lq, features, self.restorer.draw(features)))
        return found

    def measure_features(self, features: Tensor) -> None:
        """Measure what whitens features (B, C, h, w)."""
        std, mean = torch.std_mean(features.float(), (0, 2, 3), keepdim=True)
        self.whitening = [mean, std]

    def whiten(self, features: Tensor) -> Tensor:
        """Give every feature a mean of 0 and a standard deviation of 1."""
        mean, std = self.whitening
        return (features.float() - mean) / std

    def restored(
        self,
        lq: Tensor,
        timesteps: Tensor,
        *,
        decode: bool = True,
        network: OneStepStudent | None = None,
    ):
        """Run the student, or another like it, on LQ (B, 3, h, w) enlarged to (B, 3, H, W)."""
        prompts = self.student.prompt_embeddings.embeddings[:1].expand(len(lq), -1, -1)
        with self.autocast():
            return (network or self.student)(lq, timesteps, prompts, decode=decode)

    def restored_at(self, lq: Tensor, timestep: int, *, decode: bool = True):
        """Run the student on LQ at their own size, (B, 3, h, w), all at one timestep."""
        enlarged = upsample_lq(lq, [SCALE * side for side in lq.shape[-2:]])
        timesteps = torch.full((len(lq),), timestep, device=lq.device)
        return self.restored(enlarged, timesteps, decode=decode)

    def decoded(self, latents: Tensor) -> Tensor:
        """Draw latents."""
        vae = self.student.vae
        with self.autocast():
            return vae.decode(latents / vae.config.scaling_factor).sample.float()


class Adversaries(nn.Module):
    """Two that tell photographs from restorations: one by pixels, one by ImageNet's features."""

    WEIGHTS = (0.03, 0.02)
    """How much each counts against the other."""
    _LAYERS = (2, 6)
    """Of the features that the distance compares: fire4 and fire8."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels = PatchDiscriminator()
        # How much of their share they have, in [0, 1]; it goes where they go.
        self.register_buffer("trust", torch.zeros(()))
        self.heads = nn.ModuleList(
            nn.Sequential(
                spectral_norm(nn.Conv2d(channels, 64, 1)),
                nn.LeakyReLU(LEAK),
                spectral_norm(nn.Conv2d(64, 1, 3, padding=1)),
            )
            for channels in (256, 512)
        )

    def forward(self, images: Tensor, features: list[Tensor]) -> list[Tensor]:
        """Score images (B, 3, H, W) in [-1, 1], large for photographs: each (B, n).

        Args:
            features: What a `SqueezeNetDistance` compares of them.
        """
        by_features = [
            head(features[layer]).flatten(1)
            for head, layer in zip(self.heads, self._LAYERS, strict=True)
        ]
        return [self.pixels(images).flatten(1).float(), torch.cat(by_features, 1).float()]
