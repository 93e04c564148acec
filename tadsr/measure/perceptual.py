"""Perceptual distances behind one interface: `distance(pred, target) -> (B,)`."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from tadsr.errors import CheckpointError, TADSRError, import_extra
from tadsr.named_files import check_is_file

SQUEEZENET_PREFIX = "squeezenet:"
"""A perceptual distance named so is followed by the path of the network's safetensors file."""
LPIPS_PREFIX = "lpips:"
"""The same, for a file of torchvision's VGG16."""
_VGG16 = "https://download.pytorch.org/models/vgg16-397923af.pth"
_DOWNLOADS = {
    "lpips": (_VGG16,),
    "dists": (
        _VGG16,
        "https://github.com/photosynthesis-team/piq/releases/download/v0.4.1/dists_weights.pt",
    ),
}
"""What the libraries fetch on first use."""

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
    """The interface that the losses expect of a perceptual distance."""

    def __call__(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return distances (B,) of images (B, 3, H, W) in [-1, 1]."""


def make_perceptual(name: str) -> PerceptualDistance:
    """Build a perceptual distance by name.

    Args:
        name: "lpips" (VGG, of the library lpips), "lpips:FILE" with torchvision's VGG16 in a
            file, "dists" (of the library piq), or "squeezenet:FILE" for a `SqueezeNetDistance`.
            The libraries need torchvision and download their networks on first use.

    Returns:
        The distance, without gradients of its own; move it to a device with `.to`.

    Raises:
        TADSRError: The library is not installed, cannot be imported or cannot download.
        CheckpointError: FILE is not such a network.
        ValueError: The name is not known.

    Source: LPIPS (arXiv 1801.03924); DISTS (arXiv 2004.07728).
    """
    if name.startswith(SQUEEZENET_PREFIX):
        return SqueezeNetDistance(name.removeprefix(SQUEEZENET_PREFIX))
    if name == "lpips" or name.startswith(LPIPS_PREFIX):
        has_file = name != "lpips"
        with _downloading("lpips"):
            library = _import_library("lpips", name)
            network = library.LPIPS(net="vgg", pnet_rand=has_file, verbose=False)
        if has_file:
            _load_vgg16(network.net, Path(name.removeprefix(LPIPS_PREFIX)))
        return _LibraryDistance(network, low=-1)
    if name == "dists":
        with _downloading(name):
            network = _import_library("piq", name).DISTS(reduction="none")
        return _LibraryDistance(network, low=0)
    raise ValueError(
        f"perceptual must be 'lpips', '{LPIPS_PREFIX}FILE', 'dists', '{SQUEEZENET_PREFIX}FILE' or "
        f"'none', got {name!r}"
    )


@contextlib.contextmanager
def _downloading(name: str) -> Iterator[None]:
    """Say which files a library lacks, and where they belong, if it cannot download them."""
    try:
        # What they print and warn of is no concern of ours.
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except OSError as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        missing = [url for url in _DOWNLOADS[name] if not (folder / Path(url).name).is_file()]
        given = f", or give the file as {LPIPS_PREFIX}FILE" if name == "lpips" else ""
        raise TADSRError(
            f"the perceptual distance {name!r} cannot be downloaded ({error}); copy "
            f"{' and '.join(missing)} into {folder}{given}, or train without (perceptual: none, "
            "perceptual_weight: 0)"
        ) from error


def _load_vgg16(features: nn.Module, path: Path) -> None:
    """Load the convolutions of torchvision's VGG16 into the slices that LPIPS cuts it into."""
    try:
        check_is_file(path)
        if path.suffix == ".safetensors":
            stored = load_file(path)
        else:
            stored = torch.load(path, map_location="cpu", weights_only=True)
        wanted = {
            name: stored[f"features.{name.partition('.')[2]}"] for name in features.state_dict()
        }
        features.load_state_dict(wanted)
    except Exception as error:  # torch and safetensors raise many types
        raise CheckpointError(
            f"{path} must be torchvision's VGG16, as {_VGG16} is, but cannot be read as such: "
            f"{error!r}"
        ) from error


class _LibraryDistance(nn.Module):
    """A distance of another library, which takes images in [low, 1]."""

    def __init__(self, network: nn.Module, low: int) -> None:
        super().__init__()
        self.network = network
        self.low = low
        self.requires_grad_(False).eval()

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        if self.low == 0:
            # Training may leave the range that these networks take.
            pred, target = ((x / 2 + 0.5).clamp(0, 1) for x in (pred, target))
        return self.network(pred, target).flatten()


def _import_library(module: str, name: str) -> ModuleType:
    library = f"the library {module} with a torchvision that fits torch {torch.__version__}"
    otherwise = f"train without (perceptual: none, perceptual_weight: 0) or {SQUEEZENET_PREFIX}FILE"
    needs = f"the perceptual distance {name!r} needs {library}"
    return import_extra(module, needs, "train", f", or {otherwise}")


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
            check_is_file(weights)
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
        return self.compare(self.features(pred), wanted)

    @staticmethod
    def compare(found: list[Tensor], wanted: list[Tensor]) -> Tensor:
        """Return the distance of each pair by what `features` gives of its images.

        Args:
            found: Features of B images, a tensor (B, C, h, w) a layer.
            wanted: Features of B images of the same size.

        Returns:
            (B,), 0 for equal features.
        """
        layers = [
            (a - b).float().square().sum(1).flatten(1).mean(1)
            for a, b in zip(found, wanted, strict=True)
        ]
        return torch.stack(layers).mean(0)
