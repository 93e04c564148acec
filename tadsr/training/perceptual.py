"""Perceptual distances behind one interface: `distance(pred, target) -> (B,)`."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from tadsr.errors import CheckpointError

_MEAN_BGR = (104.0, 117.0, 123.0)
_FIRE = {  # name: input, squeeze, expand (twice)
    "fire2": (96, 16, 64),
    "fire3": (128, 16, 64),
    "fire4": (128, 32, 128),
    "fire5": (256, 32, 128),
    "fire6": (256, 48, 192),
    "fire7": (384, 48, 192),
    "fire8": (384, 64, 256),
}
_COMPARED = ("conv1", "fire3", "fire4", "fire5", "fire6", "fire7", "fire8")
_POOL_AFTER = ("conv1", "fire4", "fire8")
_EPS = 1e-8


class PerceptualDistance(Protocol):
    """What the losses ask of a perceptual distance."""

    def __call__(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return distances (B,) of images (B, 3, H, W) in [-1, 1]."""


class _Fire(nn.Module):
    def __init__(self, in_channels: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(in_channels, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], dim=1)


class SqueezeNetDistance(nn.Module):
    """Compare images by the features of an ImageNet SqueezeNet 1.0.

    The distance is the mean over conv1 and fire3..fire8 of the spatially averaged squared
    difference of channel-normalised features, summed over channels. It is not LPIPS: no weights
    were fitted to human judgements.

    Args:
        weights: A safetensors file with the network's convolutions (`conv1`, `fire2..8`).

    Raises:
        CheckpointError: The file is missing or is not such a network.

    Source: SqueezeNet (arXiv 1602.07360); normalised differences as in arXiv 1801.03924.
    """

    def __init__(self, weights: str | Path) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 96, 7, stride=2)
        for name, widths in _FIRE.items():
            self.add_module(name, _Fire(*widths))
        self.register_buffer("mean", torch.tensor(_MEAN_BGR)[:, None, None], persistent=False)
        try:
            tensors = load_file(weights)
            wanted = {k: tensors[k].float() for k in self.state_dict()}
            self.load_state_dict(wanted)
        except Exception as error:
            raise CheckpointError(
                f"{weights} must be a safetensors file of a SqueezeNet 1.0 "
                f"(conv1, fire2..fire8): {error}"
            ) from error
        self.requires_grad_(False).eval()

    def features(self, image: Tensor) -> list[Tensor]:
        """Return channel-normalised features of images (B, 3, H, W) in [-1, 1], finest first."""
        x = (image.flip(1) + 1) * 127.5 - self.mean  # RGB in [-1, 1] to BGR around zero
        found = []
        for name in ("conv1", *_FIRE):
            x = F.relu(self.conv1(x)) if name == "conv1" else getattr(self, name)(x)
            if name in _COMPARED:
                norm = x.float().square().sum(1, keepdim=True).add(_EPS).sqrt()
                found.append(x / norm)
            if name in _POOL_AFTER:
                x = F.max_pool2d(x, 3, 2, ceil_mode=True)
        return found

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return the distance of each pair.

        Args:
            pred: Images, (B, 3, H, W), in [-1, 1], at least 48 px on each side.
            target: Images, shaped as `pred`.

        Returns:
            (B,), 0 for equal images.
        """
        with torch.no_grad():
            wanted = self.features(target)
        layers = [
            (a - b).float().square().sum(1).flatten(1).mean(1)
            for a, b in zip(self.features(pred), wanted, strict=True)
        ]
        return torch.stack(layers).mean(0)
