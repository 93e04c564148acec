"""What the demo's buttons do, without the page."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image

from tadsr.conditioning import TimestepMap
from tadsr.config import ColorFix, UpscaleSettings
from tadsr.errors import (
    CheckpointError,
    ImageReadError,
    ImageTooLargeError,
    ImageWriteError,
    TADSRError,
)
from tadsr.image_files import INPUT_SUFFIXES
from tadsr.images import ArrayImage, ImageLike, read_image, write_image
from tadsr.images.limits import BOMBS
from tadsr.locks import Lock
from tadsr.measure.pictures import to_rgb8
from tadsr.measure.sweep import TimestepSweep
from tadsr.progress import Progress
from tadsr.tile_spec import TileSpec

if TYPE_CHECKING:
    from tadsr.restorer import Restorer

PREVIEW_PX = 2048
"""Longer side of what the browser is shown; the file keeps every pixel."""
CANVAS_PX = 1024
"""Longer side of what is painted on."""
MAX_PROMPT_LETTERS = 2000
MAX_LAYER_PX = 4 * CANVAS_PX
"""Longest side of a painting that is read; the page sends `CANVAS_PX`."""
MAX_LAYERS = 8
"""Most layers of a painting; the page sends one."""

KEPT_PRIMITIVES = 128
"""Operations of a size of picture that oneDNN and PyTorch each keep on a CPU; their own limit is
1024, over 200 MB."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DemoLimits:
    """What one visitor may ask for."""

    max_upload_bytes: int = 50_000_000
    """Size of an uploaded file in bytes, at least 1."""
    max_output_pixels: int = 64_000_000
    """Width × height of a result in px, at least 1."""
    max_canvas_pixels: int = 24_000_000
    """Width × height of a photo that can be painted on, in px, at least 1."""

    def __post_init__(self) -> None:
        for name in ("max_upload_bytes", "max_output_pixels", "max_canvas_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, eq=False)
class Choices:
    """What a visitor has set."""

    timestep: int | None = None
    """0..999; None for the model's own."""
    painted_timestep: int = 1
    """0..999, where `painted` is."""
    painted: np.ndarray | None = None
    """Strength of the paint, uint8, (h, w), spread over the photo; None for none."""
    scale: float = 4
    """Output size over input size, at least 1."""
    prompt: str = ""
    """What the photo shows, for models that read text."""
    color_fix: ColorFix = "adain"
    """How the photo's colours are kept."""
    tile_px: int | None = None
    """How far a piece of a large image looks, in px, a multiple of 128; 0 for everywhere, None
    for the library's choice."""

    def __post_init__(self) -> None:
        if len(self.prompt) > MAX_PROMPT_LETTERS:
            raise ValueError(f"prompt must have at most {MAX_PROMPT_LETTERS} letters")

    @property
    def is_painted(self) -> bool:
        """Whether a part has the paint's timestep."""
        return self.painted is not None and bool(self.painted.any())

    def timestep_or(self, default: int) -> int:
        """Return the timestep beside the paint; `default` is the model's own."""
        return default if self.timestep is None else self.timestep

    def timestep_map(self, default: int) -> int | TimestepMap:
        """Return the timestep, or the map that the paint makes; `default` is the model's own."""
        if not self.is_painted:
            return self.timestep_or(default)
        ends = (self.timestep_or(default), self.painted_timestep)
        return TimestepMap.from_image(Image.fromarray(self.painted), ends)

    def describe_timesteps(self, default: int) -> str:
        """Say which timesteps a result has; `default` is the model's own."""
        paint = f", {self.painted_timestep} where painted" if self.is_painted else ""
        return f"timestep {self.timestep_or(default)}{paint}"


@dataclass(frozen=True, eq=False)
class Restored:
    """A result, to look at and to keep."""

    before: Image.Image
    """The photo enlarged by bicubic, at most `PREVIEW_PX` a side."""
    after: Image.Image
    """The result, of the same size."""
    file: Path
    """The result as PNG, with every pixel and the photo's metadata."""
    summary: str
    """Sizes, seconds and timesteps in a sentence."""


def uploaded_file(folder: Path, payload: Mapping[str, object] | None) -> Path | None:
    """Return the file that a request names.

    Args:
        folder: Where visitors' files are uploaded to; no other file is theirs to name.
        payload: With "path", as the page or any other client sent it; None for no file.
    """
    if payload is None or payload.get("path") is None:
        return None
    try:
        path = os.path.realpath(str(payload["path"]))
    except ValueError:  # a null byte
        path = ""
    if os.path.isfile(path) and Path(path).is_relative_to(os.path.realpath(folder)):
        return Path(path)
    raise ValueError("a photo must be uploaded before it is named; upload it again")


class Models:
    """The models that the demo offers, each loaded when it is first asked for."""

    def __init__(self, names: Sequence[str], load: Callable[[str], Restorer]) -> None:
        for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
            os.environ.setdefault(name, str(KEPT_PRIMITIVES))
        self.names = tuple(names)
        self._load = load
        self._loaded: dict[str, Restorer] = {}
        self._lock = Lock()

    def get(self, name: str) -> Restorer:
        """Return a model's pipeline."""
        if name not in self.names:
            raise ValueError(f"the model must be one of {', '.join(self.names)}, got {name!r}")
        with self._lock:
            if name not in self._loaded:
                self._loaded[name] = self._load(name)
            return self._loaded[name]


def sentence_for(error: Exception) -> str:
    """Return what a visitor is told of an error; what concerns the server goes to its log."""
    if isinstance(error, MemoryError):
        return "there is not enough memory for this; take a smaller photo"
    is_visitors = isinstance(error, (TADSRError, ValueError, TypeError))
    if is_visitors and not isinstance(error, (CheckpointError, ImageWriteError)):
        return str(error)
    _log.error("a photo could not be restored", exc_info=error)
    return "something went wrong; the server's log says what"


def reads_text(pipe: Restorer) -> bool:
    """Tell whether a model takes any prompt, or only those it was saved with."""
    return pipe.text_encoder is not None


def restore(
    pipe: Restorer,
    photo: Path | None,
    choices: Choices,
    folder: Path,
    *,
    limits: DemoLimits,
    progress: Progress | None = None,
) -> Restored:
    """Restore an uploaded photo."""
    image, settings = _prepare(photo, choices, limits)
    begin = time.monotonic()
    result = pipe(
        image,
        choices.timestep_map(pipe.default_timestep),
        settings=settings,
        prompt=choices.prompt,
        progress=progress,
    )
    seconds = time.monotonic() - begin
    file = folder / f"{photo.stem}_x{settings.scale:g}.png"
    write_image(result, file, overwrite=True)
    before, after = (Image.fromarray(to_rgb8(picture)) for picture in (image, result))
    summary = (
        f"{before.width}×{before.height} to {after.width}×{after.height} px in {seconds:.1f} s, "
        f"{choices.describe_timesteps(pipe.default_timestep)}."
    )
    after.thumbnail((PREVIEW_PX, PREVIEW_PX), Image.Resampling.LANCZOS)
    before = before.resize(after.size, Image.Resampling.BICUBIC)
    return Restored(before, after, file, summary)


def draw_sweep(
    pipe: Restorer,
    photo: Path | None,
    choices: Choices,
    timesteps: Sequence[int],
    *,
    limits: DemoLimits,
    progress: Progress | None = None,
) -> Image.Image:
    """Draw an uploaded photo at several timesteps on one sheet."""
    image, settings = _prepare(photo, choices, limits)
    pixels = to_rgb8(image)
    results = pipe.sweep(
        pixels, timesteps, settings=settings, prompt=choices.prompt, progress=progress
    )
    images = dict(zip(timesteps, map(to_rgb8, results), strict=True))
    return TimestepSweep(pixels, images).draw()


def canvas_for(photo: Path, limits: DemoLimits) -> Image.Image:
    """Return a photo as something to paint on."""
    try:
        photo_read = _read(photo, limits, min(limits.max_canvas_pixels, limits.max_output_pixels))
    except ImageTooLargeError:
        raise ImageReadError(
            f"a photo must have at most {limits.max_canvas_pixels / 1e6:g} megapixels to be "
            "painted on; without paint it is restored all the same"
        ) from None
    canvas = Image.fromarray(to_rgb8(_shrunk(photo_read)))
    # Small photos are enlarged as well: the brush has one size.
    size = (max(1, round(side * CANVAS_PX / max(canvas.size))) for side in canvas.size)
    return canvas.resize(tuple(size), Image.Resampling.LANCZOS)


def paint_of(layers: Sequence[Path | BinaryIO]) -> np.ndarray | None:
    """Return the strength of a painting's strokes, uint8 (h, w), whatever their colour."""
    if len(layers) > MAX_LAYERS:
        raise ValueError(f"a painting must have at most {MAX_LAYERS} layers, got {len(layers)}")
    alphas = []
    for layer in layers:
        try:
            with Image.open(layer, formats=("PNG", "WEBP")) as image:
                if max(image.size) > MAX_LAYER_PX:
                    raise ValueError(f"a painting must have at most {MAX_LAYER_PX} px a side")
                alphas.append(np.asarray(image.convert("RGBA"))[..., 3])
        except (OSError, SyntaxError, *BOMBS) as error:
            raise ValueError("a painting must be PNG or WebP; paint it again") from error
    if len({alpha.shape for alpha in alphas}) > 1:
        raise ValueError("the layers of a painting must have one size; paint it again")
    return np.max(alphas, axis=0) if alphas else None


def _prepare(
    photo: Path | None, choices: Choices, limits: DemoLimits
) -> tuple[ImageLike, UpscaleSettings]:
    if photo is None:
        raise ValueError("a photo must be there before it is restored; upload one")
    tiling = "auto" if choices.tile_px is None else TileSpec(attention_px=choices.tile_px)
    settings = UpscaleSettings(choices.scale, choices.color_fix, tiling=tiling)
    try:
        image = _read(photo, limits, max(1, int(limits.max_output_pixels / settings.scale**2)))
        height, width = settings.output_size(image.height, image.width)
    except ImageTooLargeError:
        image = None
    if image is None or height * width > limits.max_output_pixels:
        raise TADSRError(
            f"the result must have at most {limits.max_output_pixels / 1e6:g} megapixels here; "
            "take a smaller photo or scale"
        )
    return image, settings


def _shrunk(image: ImageLike) -> ImageLike:
    """Return a large image smaller, but larger than a canvas, before anything costs memory."""
    factor = max(image.width, image.height) // (2 * CANVAS_PX)
    if factor < 2:
        return image
    if isinstance(image, ArrayImage):
        return ArrayImage(image.pixels[::factor, ::factor], image.info)
    size = (max(1, image.width // factor), max(1, image.height // factor))
    return image.resize(size, Image.Resampling.BOX)


def _read(photo: Path, limits: DemoLimits, max_pixels: int) -> ImageLike:
    num_bytes = photo.stat().st_size
    if num_bytes > limits.max_upload_bytes:
        raise TADSRError(
            f"a photo must have at most {limits.max_upload_bytes / 1e6:g} MB here, got "
            f"{num_bytes / 1e6:.1f} MB; save it smaller"
        )
    if photo.suffix.lower() not in INPUT_SUFFIXES:
        raise TADSRError(
            f"a photo must be {', '.join(sorted(s[1:] for s in INPUT_SUFFIXES))}, "
            f"got {photo.suffix or 'a name without a suffix'}"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an animation the first frame is meant
        try:
            return read_image(photo, max_pixels=max_pixels)
        except ImageTooLargeError:
            raise
        except ImageReadError as error:  # where uploads lie is not the visitors' business
            raise ImageReadError(str(error).replace(str(photo), photo.name)) from None
