"""Where training samples come from and how they are made, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tadsr.degradation import DegradationConfig, find_preset
from tadsr.field_checks import Count, Natural, Place, Probability, Within, check_fields

Kind = Literal["auto", "folder", "pairs", "list", "huggingface", "webdataset"]
"""What a source is; "auto" tells by its name."""

DEFAULT_CROP_PX = 512
"""What Stable Diffusion 2.1-base was trained on."""
_PRESET_SHARES = ("bicubic_probability", "mild_probability", "web_probability")


@dataclass(frozen=True)
class RestoredConfig:
    """A finite set of samples that carry what a restoration network makes of their LQ."""

    folder: Place
    """Folder where they are kept, computed once; an interrupted computation goes on."""
    num_samples: Count = 20000
    """How many there are, at least 1. With more of them, those that are kept stay the same."""
    network: Place | None = None
    """Checkpoint of the network, of any architecture that spandrel detects; None takes the callable
    that `Trainer` is given, or needs all samples to be there."""
    seed: Natural = 0
    """Seed of crops and degradations, at least 0; the run's seed draws their order and turns."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class DataConfig:
    """Photographs, and how their low-quality partners are made."""

    source: Place
    """Folder of HQ photographs (searched recursively), list file (*.txt), data set id
    "owner/name" on the hub, or WebDataset shards (*.tar, braces allowed)."""
    kind: Kind = "auto"
    """What the source is."""
    lq: Place | None = None
    """Folder of LQ partners with the same relative names, at 1/scale or at the HQ's size; None
    degrades on the fly."""
    lq_resize: Literal["bicubic", "lanczos"] = "bicubic"
    """How stored LQ partners at 1/scale are enlarged (published code: lanczos)."""
    crop_px: int | None = None
    """Side of the square HQ crop in px, a multiple of 8 and of `scale`; None is 512, or 128 for a
    model inside the package."""
    scale: Count = 4
    """Down-sampling from HQ to LQ, at least 1."""
    min_zoom: Annotated[float, Within(0, 1, is_open=True)] = 1.0
    """Crops are taken from the photo shrunk by a random factor in [min_zoom, 1], which gives new
    sharp detail; in (0, 1], 1 is off."""
    flip: bool = True
    """Whether crops are mirrored at random."""
    rotate: bool = False
    """Whether crops are turned by multiples of 90° at random."""
    degradation: str | DegradationConfig = "realesrgan"
    """Name of a preset of `tadsr.degradation`, or ranges of your own; in a recipe a mapping, which
    may start from a preset (`preset: mild`)."""
    bicubic_probability: Probability = 0.01
    """Probability of plain bicubic reduction in its place, in [0, 1] (published code: 1 %)."""
    mild_probability: Probability = 0.0
    """Probability of the preset "mild" in its place, in [0, 1]."""
    web_probability: Probability = 0.0
    """Probability of the preset "web" in its place, in [0, 1]; the three at most 1 together."""
    degrade_on: Literal["worker", "device"] = "worker"
    """Where degradation is computed: in the worker processes, or by `Batch.to` on its device."""
    prompt: str = ""
    """Prompt of every sample that has no caption."""
    captions: Place | None = None
    """None for none; "sidecar" for a .txt beside each photo; a file of `tadsr tag` (*.jsonl); or
    one of lines "relative name<TAB>caption". Lists and streams carry their own captions."""
    prompt_dropout: Probability = 0.0
    """Probability of an empty prompt, in [0, 1]."""
    split: str = "train"
    """Part of a data set on the hub."""
    image_column: str = "image"
    """Column of a data set on the hub that holds images."""
    caption_column: str | None = None
    """Column of a data set on the hub, or suffix in shards, that holds captions."""
    shuffle_buffer: Count = 1000
    """Samples that a stream is shuffled over, at least 1."""
    cache_photos: bool = False
    """Keep decoded photos in memory, for sets of a few hundred."""
    num_workers: Natural = 2
    """Processes that prepare samples beside the training process, at least 0."""
    restored: RestoredConfig | None = None
    """Draw from a finite set of samples with a restoration network's results, flipped and turned at
    random each time; None makes every sample anew, without such results."""

    def __post_init__(self) -> None:
        check_fields(self)
        crop_px = DEFAULT_CROP_PX if self.crop_px is None else self.crop_px
        if crop_px < 8 or crop_px % 8 or crop_px % self.scale:
            raise ValueError(
                f"crop_px must be a positive multiple of 8 and of the scale {self.scale}, "
                f"got {self.crop_px}"
            )
        shares = [getattr(self, name) for name in _PRESET_SHARES]
        if sum(shares) > 1:
            names = ", ".join(_PRESET_SHARES)
            raise ValueError(f"{names} must be at most 1 together, got {shares}")
        find_preset(self.degradation)
