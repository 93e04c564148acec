"""Animations: GIF, WebP and APNG, frame by frame."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tadsr.config import MAX_PIXELS
from tadsr.errors import ImageWriteError, reason_of
from tadsr.images.decoding import decode_image, lay_over, mark_as_made, strip_metadata
from tadsr.images.encoding import encode_image
from tadsr.images.files import (
    check_writable,
    is_see_through,
    save_options,
    to_palette,
)
from tadsr.images.limits import (
    FRAME_PIXEL_BYTES,
    PIXEL_BYTES,
    check_size,
    named_errors,
    pillow_opens,
)
from tadsr.images.metadata import (
    COLOR_KEYS,
    find_metadata,
    find_orientation,
    kept_metadata,
    read_exif,
    turn_upright,
    upright_metadata,
    upright_size,
)
from tadsr.images.reading import frames_of, open_image, opened
from tadsr.images.strips import PngWriter, open_whole

_RESTORE_BACKGROUND = 2
_GIF_MS, _WEBP_MS = 655_350, 2**24 - 1
"""Longest time that a frame may be shown."""


@dataclass(frozen=True)
class Animation:
    """The frames of a file; iterate to get them one by one as PIL images.

    Each is whole, as it is seen: what earlier frames leave standing is in it.

    Args:
        path: The file, which is read anew at each iteration.
        size: Width and height in px, upright.
        durations_ms: How long each frame is shown.
        num_plays: How often all are shown, 0 for ever.
        has_transparency_data: Whether any frame is transparent anywhere: all are RGBA then, else
            RGB.
        info: Metadata of the file, which each frame carries.
        orientation: Of the file's frames, as in EXIF; they are turned upright by it.
        max_pixels: Largest width × height that is read, as for `read_image`.
    """

    path: Path
    size: tuple[int, int]
    durations_ms: tuple[float, ...]
    num_plays: int = 0
    has_transparency_data: bool = False
    info: Mapping[str, Any] = field(default_factory=dict, hash=False)
    orientation: int = 1
    max_pixels: int | None = MAX_PIXELS
    background: tuple[int, int, int] | None = None
    """Colour that transparent frames are laid over; None leaves them transparent."""

    def __len__(self) -> int:
        return len(self.durations_ms)

    def __iter__(self) -> Iterator[Image.Image]:
        with named_errors(self.path):
            with pillow_opens(self.max_pixels):
                image = open_image(self.path, self.max_pixels)
            with image:
                with pillow_opens(self.max_pixels):
                    indices = frames_of(image)
                for index in indices:
                    with pillow_opens(self.max_pixels):  # not while others work on the frame
                        image.seek(index)
                        frame = image.convert("RGBA" if self.has_transparency_data else "RGB")
                    if self.orientation != 1:
                        frame = turn_upright(frame, self.orientation)
                    frame.info = dict(self.info)
                    yield frame if self.background is None else lay_over(frame, self.background)

    @property
    def is_see_through(self) -> bool:
        """Whether any frame is transparent anywhere."""
        return self.has_transparency_data and self.background is None

    def lay_over(self, color: tuple[int, int, int]) -> Animation:
        """Return it with its frames laid over a colour, red, green and blue of 0..255."""
        return replace(self, background=color) if self.has_transparency_data else self

    def mark_as_made(self) -> Animation:
        """Return it so that results say that tadsr has made them."""
        return replace(self, info=mark_as_made(self._blank()).info)

    def strip_metadata(self) -> Animation:
        """Return it without metadata but the ICC profile, as `strip_metadata` does."""
        return replace(self, info=strip_metadata(self._blank()).info)

    def _blank(self) -> Image.Image:
        blank = Image.new("RGB", (1, 1))
        blank.info = dict(self.info)
        return blank


def read_frames(path: str | os.PathLike[str], *, max_pixels: int | None = MAX_PIXELS) -> Animation:
    """Read an animation; a still image is one of a single frame.

    Args:
        path: GIF, WebP, APNG or AVIF.
        max_pixels: Largest width × height of a frame, as for `read_image`.

    Returns:
        Its frames, read when iterated over.

    Raises:
        ValueError: If `max_pixels` is below 1.
        ImageReadError: As for `read_image`; any damaged frame is found here already.
    """
    path = Path(path)
    with opened(path, max_pixels) as image:
        durations, has_alpha = [], False
        colors = {key: image.info[key] for key in COLOR_KEYS if key in image.info}
        indices = frames_of(image)
        cost = FRAME_PIXEL_BYTES if len(indices) > 1 else PIXEL_BYTES
        for index in indices:
            image.seek(index)
            # Here, as a GIF may grow on the way.
            check_size(path, *image.size, max_pixels, pixel_bytes=cost, num_frames=len(indices))
            image.load()
            durations.append(float(image.info.get("duration") or 0))
            has_alpha = has_alpha or is_see_through(image)
        loop = image.info.get("loop")
        if image.format == "GIF":
            # It counts repetitions, and says nothing for none.
            loop = 1 if loop is None else loop and loop + 1
        return Animation(
            path,
            upright_size(image),
            tuple(durations),
            loop or 0,
            has_alpha,
            upright_metadata(read_exif(image), find_metadata(image) | colors, b"RGB "),
            find_orientation(image),
            max_pixels,
        )


def write_frames(
    frames: Iterable[Image.Image],
    path: str | os.PathLike[str],
    *,
    durations_ms: Sequence[float],
    num_plays: int = 0,
    quality: int | None = None,
    is_lossless: bool = False,
    overwrite: bool = True,
) -> None:
    """Write an animation whole or not at all, each frame as soon as it is there.

    APNG keeps all colours and keeps no frame in memory. WebP is lossy, GIF has 256 colours a
    frame, no half-transparency, and durations of whole 10 ms; for both all frames are in memory.

    Args:
        frames: PIL images of one size; the first one's metadata is kept, in GIF none.
        path: .png, .apng, .webp or .gif.
        durations_ms: How long each is shown; as many as frames.
        num_plays: How often all are shown, 0 for ever.
        quality: Of WebP, 1..100; None for 90.
        is_lossless: Whether WebP loses nothing.
        overwrite: Whether an existing file may be replaced.

    Raises:
        ValueError: If there are no frames, or another number of durations.
        ImageWriteError: If `check_writable` says so, frames differ in size, or writing fails,
            which leaves any existing file as it was.
    """
    check_writable(path, overwrite=overwrite, num_frames=len(durations_ms))
    suffix = Path(path).suffix.lower()
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise ValueError("frames must hold at least one image, got none")
    check_writable(path, has_alpha=first.has_transparency_data, size=first.size)
    like = decode_image(first)
    mode = "RGB" if like.alpha is None else "RGBA"
    # Turns the first upright, and gives it metadata that fits.
    first = encode_image(like.rgb, like.alpha, like, "pil").convert(mode)
    alike = _checked(itertools.chain([first], frames), mode, first.size, path)
    with open_whole(path) as file:
        if suffix in (".png", ".apng"):
            shape = (first.height, first.width, len(mode))
            writer = PngWriter(file, shape, np.dtype(np.uint8), kept_metadata(first.info, b"RGB "))
            writer.write_frames(map(np.asarray, alike), durations_ms, num_plays)
            return
        # A duration for each: `zip` tells where their numbers differ.
        pairs = list(zip(alike, durations_ms, strict=True))
        images = [image for image, _ in pairs]
        if suffix == ".webp":
            format, durations = "WEBP", [min(round(ms), _WEBP_MS) for ms in durations_ms]
            options = save_options(first, format, quality, is_lossless=is_lossless)
            options["loop"] = num_plays
        else:
            format, durations = "GIF", _hundredths(durations_ms)
            images = [to_palette(image) for image in images]
            # Each frame replaces all of the one before, where that shows through.
            options = {"disposal": _RESTORE_BACKGROUND} if mode == "RGBA" else {}
            options["optimize"] = False
            if "comment" in first.info:
                options["comment"] = first.info["comment"]
            if num_plays != 1:
                options["loop"] = max(num_plays - 1, 0)
        try:
            images[0].save(
                file,
                format,
                save_all=True,
                append_images=images[1:],
                duration=durations if len(images) > 1 else durations[0],
                **options,
            )
        except Exception as error:
            raise ImageWriteError(
                f"{path}: cannot be written as {format}: {reason_of(error)}"
            ) from error


def _hundredths(durations_ms: Sequence[float]) -> list[int]:
    """Round durations to what GIF can hold, so that the sum keeps time."""
    # Below 20 ms viewers wait for a tenth of a second instead.
    rounded: list[int] = []
    for total in accumulate(min(duration, _GIF_MS) for duration in durations_ms):
        rounded.append(min(_GIF_MS, max(20, round((total - sum(rounded)) / 10) * 10)))
    return rounded


def _checked(
    frames: Iterable[Image.Image], mode: str, size: tuple[int, int], path: object
) -> Iterator[Image.Image]:
    for frame in frames:
        if frame.size != size:
            raise ImageWriteError(
                f"{path}: frames must all have one size, got {size} and {frame.size}"
            )
        yield frame.convert(mode)
