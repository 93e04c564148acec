"""Samples with what a restoration network makes of them, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from tadsr.checkpoints.json_files import read_json
from tadsr.checkpoints.tensor_files import TensorReader, read_pickle
from tadsr.errors import CheckpointError, DataError, import_extra
from tadsr.training.data.listed import ListedPhotos, draw_in_epochs
from tadsr.training.data.samples import Batch, draw_turn
from tadsr.training.training_config import DataConfig
from tadsr.whole_file import whole_file

Restorer = Callable[[Tensor], Tensor]
"""A restoration network: RGB (B, 3, h, w) in [0, 1] to (B, 3, scale·h, scale·w), about [0, 1]."""


SAMPLES_PER_FILE = 64
_BATCH = 8
"""Samples that the network gets at once."""
_DECISIVE = ("crop_px", "scale", "min_zoom", "max_zoom", "degradation", "bicubic_probability",
             "mild_probability", "web_probability", "prompt", "captions",
             "prompt_dropout")  # fmt: skip
"""Settings that samples on disk depend on."""
_TURN_KEY = 2
"""Keeps the turns of a sample apart from other numbers drawn for it."""


def load_restorer(path: str | Path, scale: int) -> Restorer:
    """Load a restoration network of any architecture that the library spandrel detects.

    Args:
        path: Its checkpoint, such as RealESRGAN_x4plus.pth or a safetensors file; pickles are
            read without executing anything.

    Returns:
        The network in float32, on the CPU, without gradients: RGB (B, 3, h, w) in [0, 1] to
        (B, 3, scale·h, scale·w) in [0, 1].
    """
    library = f"spandrel with a torchvision that fits torch {torch.__version__}"
    needs = f"restoration networks need the library {library}"
    spandrel = import_extra("spandrel", needs, "train", ", or give Trainer a callable")
    path = Path(path)
    # Not load_from_file, which would run a TorchScript file.
    is_safe = path.suffix == ".safetensors"
    state = dict(TensorReader([path]).items()) if is_safe else read_pickle(path)
    try:
        state = spandrel.canonicalize_state_dict(state)
        network = spandrel.ModelLoader().load_from_state_dict(state)
    except Exception as error:
        raise CheckpointError(
            f"{path} must be the checkpoint of a network that spandrel knows: {error}"
        ) from error
    kind = getattr(network, "architecture", None)
    if not isinstance(network, spandrel.ImageModelDescriptor) or network.scale != scale:
        raise CheckpointError(
            f"{path} must restore one RGB image and enlarge it by {scale}, got "
            f"{getattr(kind, 'name', type(network).__name__)} of scale {network.scale}"
        )
    network.model.requires_grad_(False).eval().float()
    return network


class RestoredSamples(Dataset):
    """A finite set of samples on disk, each with a restoration network's result.

    Sample i of the set is a function of the photographs and the configuration; training goes over
    the set in epochs and turns each sample anew.

    Args:
        restorer: The network, in evaluation mode; None loads the configured one if samples are
            missing.
    """

    def __init__(
        self, photos: ListedPhotos, config: DataConfig, seed: int, restorer: Restorer | None
    ) -> None:
        self.photos = photos
        self.config = config
        self.seed = seed
        self.restorer = restorer
        self.folder = Path(config.restored.folder)
        self.count = config.restored.num_samples
        self._claim()
        if restorer is None and any(self._missing_files()):
            if config.restored.network is None:
                raise DataError(
                    f"{self.folder} must hold {self.count} samples where no network is given to "
                    "make them, but some are missing; set data.restored.network"
                )
            self.restorer = load_restorer(config.restored.network, config.scale)

    def prepare(self, device: torch.device | str, rank: int = 0, num_processes: int = 1) -> None:
        """Compute what is missing; files are whole or absent, so that it can be interrupted."""
        missing = list(self._missing_files())[rank::num_processes]
        if missing and hasattr(self.restorer, "to"):
            self.restorer.to(device)
        for path in tqdm(missing, "restoring", unit="file", disable=None if rank == 0 else True):
            self._make_file(path, device)
        self.restorer = None  # worker processes have no use for it

    def __getitem__(self, index: int) -> Batch:
        """Read a sample of the set, flipped and turned as its place in the sequence says."""
        place = draw_in_epochs(index, self.count, self.seed)
        number, row = divmod(place, SAMPLES_PER_FILE)
        with safe_open(self._path(number), "pt") as file:
            prompt, name = (json.loads(file.metadata()[key])[row] for key in ("prompts", "names"))
            pixels = [file.get_slice(key)[row : row + 1] for key in ("hq", "lq", "restored")]
        turn = draw_turn(self.config, np.random.default_rng([self.seed, index, _TURN_KEY]))
        hq, lq, restored = (turn(x.float() / 127.5 - 1) for x in pixels)
        return Batch(hq, lq, (prompt,), torch.tensor([index]), None, (name,), (), restored)

    def _path(self, number: int) -> Path:
        return self.folder / f"samples_{number:06d}.safetensors"

    def _missing_files(self) -> Iterator[Path]:
        paths = map(self._path, range(-(-self.count // SAMPLES_PER_FILE)))
        return (path for path in paths if not path.is_file())

    def _claim(self) -> None:
        """Record what the folder's samples are, or check that they are the same."""
        photos = "\n".join(str(_relative(r.hq, self.config.source)) for r in self.photos.records)
        network = self.config.restored.network
        settings = json.loads(json.dumps(asdict(self.config)))  # as they come back from the file
        facts = {name: settings[name] for name in _DECISIVE} | {
            "seed": self.config.restored.seed,
            "photos": hashlib.sha256(photos.encode()).hexdigest(),
            "network": None if network is None else Path(network).name,
        }
        path = self.folder / "samples.json"
        if path.is_file():
            # Of sets from before a setting was there it has its default.
            defaults = asdict(DataConfig(self.config.source))
            found = {name: defaults[name] for name in _DECISIVE} | read_json(path)
            names = sorted(facts.keys() | found.keys())
            differing = [name for name in names if facts.get(name) != found.get(name)]
            if differing:
                raise DataError(
                    f"{self.folder} must hold samples of this run's photographs, settings and "
                    f"network, but they differ in {', '.join(differing)}; choose another "
                    "data.restored.folder, or delete it"
                )
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    @torch.inference_mode()
    def _make_file(self, path: Path, device: torch.device | str) -> None:
        first = int(path.stem.rpartition("_")[2]) * SAMPLES_PER_FILE
        # Always a whole file: what lies beyond the count is there once the count grows.
        samples = [self.photos[i] for i in range(first, first + SAMPLES_PER_FILE)]
        scale = self.config.scale
        for sample in samples:
            if sample.lq.shape[-1] * scale != sample.hq.shape[-1]:
                raise DataError(
                    f"the LQ that a restoration network gets must be 1/{scale} of its HQ, got "
                    f"{sample.lq.shape[-1]} and {sample.hq.shape[-1]} px in {sample.names[0]}"
                )
        hq, lq = (torch.cat([getattr(s, name) for s in samples]) for name in ("hq", "lq"))
        batches = (lq / 2 + 0.5).split(_BATCH)
        restored = torch.cat([self.restorer(b.to(device)).float().cpu() for b in batches])
        if restored.shape != hq.shape:
            raise DataError(
                f"the restoration network must enlarge by {scale}, from {tuple(lq.shape[1:])} to "
                f"{tuple(hq.shape[1:])}, got {tuple(restored.shape[1:])}"
            )
        images = {"hq": hq, "lq": lq, "restored": restored * 2 - 1}
        tensors = {
            name: ((x.clamp(-1, 1) + 1) * 127.5).round().byte().contiguous()
            for name, x in images.items()
        }
        names = [str(_relative(Path(s.names[0]), self.config.source)) for s in samples]
        prompts = [s.prompts[0] for s in samples]
        metadata = {"prompts": json.dumps(prompts), "names": json.dumps(names)}
        with whole_file(path) as partial:
            save_file(tensors, partial, metadata)


def _relative(path: Path, source: str) -> Path:
    return path.relative_to(source) if path.is_relative_to(source) else path
