"""One image from file to file, in three stages that a run overlaps: read, restore, write."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from tadsr.config import MAX_PIXELS, TargetSize, UpscaleSettings
from tadsr.errors import ImageWriteError, TADSRError
from tadsr.folders.jobs import Job
from tadsr.progress import Progress

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from tadsr.conditioning import TimestepLike
    from tadsr.images import Animation, ArrayImage
    from tadsr.restorer import Restorer

    SourceImage: TypeAlias = Image.Image | ArrayImage | Animation
_LEAST_BYTES_PER_PIXEL = 12
"""Three channels of float32, before the colour fix."""
STREAMED_PIXELS = 2**26
"""Results with more pixels are written strip by strip, where their format can."""


@dataclass(frozen=True)
class FileRequest:
    """What is done to every image of a run."""

    settings: UpscaleSettings = field(default_factory=UpscaleSettings)
    """Scale, colour fix, smallest size and pieces."""
    size: TargetSize | None = None
    """Of every result, in place of a scale; what is too large is restored and shrunk."""
    timestep: TimestepLike | None = None
    """0..999; small is faithful, large is vivid; or a map over the image; None for the model's."""
    prompt: str | None = None
    """What the pictures show, after what the pipeline's tagger says if there is one."""
    seed: int | None = None
    """Samples the encoder's posterior, anew for each image; None takes its mean."""
    quality: int | None = None
    """1..100, of JPEG, WebP and AVIF; None for their defaults."""
    is_lossless: bool = False
    """Whether WebP loses nothing."""
    keeps_dates: bool = False
    """Whether results have their input's times of change and access."""
    overwrite: bool = False
    """Whether results that exist are replaced."""
    background: tuple[int, int, int] | None = None
    """Red, green and blue, 0..255, that transparent pictures are laid over; None keeps alpha."""
    strip: bool = False
    """Whether metadata is dropped, but for the ICC profile."""
    max_pixels: int | None = MAX_PIXELS
    """Largest input in pixels, as for `read_image`."""

    def output_size(self, image: SourceImage) -> tuple[int, int]:
        """Return the result's width and height in px."""
        return self.output_size_of(_upright_size(image))

    def output_size_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the width and height in px of what an input of a width and height becomes."""
        width, height = size
        scale = self.settings.scale if self.size is None else self.size.scale_of(height, width)
        return max(1, round(scale * width)), max(1, round(scale * height))

    def settings_for(self, image: SourceImage) -> UpscaleSettings:
        """Return the settings of an image, whose scale its size may decide."""
        if self.size is None:
            return self.settings
        width, height = _upright_size(image)
        return replace(self.settings, scale=max(1.0, self.size.scale_of(height, width)))

    def writing(self, job: Job) -> dict[str, Any]:
        """Return how a job's result is written."""
        overwrite = self.overwrite or job.may_replace
        return {"quality": self.quality, "is_lossless": self.is_lossless, "overwrite": overwrite}

    def described(self) -> dict[str, Any]:
        """Return what results depend on, as JSON's types."""
        spec = self.settings.tiling
        return {
            "timestep": self.timestep if isinstance(self.timestep, int | None) else "map",
            "scale": self.settings.scale,
            "color_fix": self.settings.color_fix,
            "process_size": self.settings.process_size,
            "prompt": self.prompt,
            "seed": self.seed,
            "attention_px": None if spec is None or spec == "auto" else spec.attention_px,
            "quality": self.quality,
            "strip": self.strip,
            # What came later is named where it is used, so that earlier runs go on.
            **({} if self.background is None else {"background": self.background}),
            **({} if self.size is None else {"scale": None, "size": asdict(self.size)}),
            **({"lossless": True} if self.is_lossless else {}),
            **({"seamless": seamless} if (seamless := self.settings.seamless) else {}),
        }


def _upright_size(image: SourceImage) -> tuple[int, int]:
    from PIL import Image

    from tadsr.images import upright_size

    return upright_size(image) if isinstance(image, Image.Image) else image.size


def read_input(job: Job, request: FileRequest) -> SourceImage:
    """Read an image and check that its result can be written, before the long computation.

    Raises:
        OSError: The result's folder cannot be made.
    """
    from tadsr import images

    limit = request.max_pixels
    is_animated = images.count_frames(job.source, max_pixels=limit) > 1
    read = images.read_frames if is_animated else images.read_image
    image = read(job.source, max_pixels=limit)
    color = request.background
    if is_animated:
        image = image.strip_metadata() if request.strip else image.mark_as_made()
        image = image if color is None else image.lay_over(color)
    else:
        image = image if color is None else images.lay_over(image, color)
        image = (images.strip_metadata if request.strip else images.mark_as_made)(image)
    job.target.parent.mkdir(parents=True, exist_ok=True)
    images.check_writable(
        job.target,
        has_alpha=image.is_see_through if is_animated else images.is_see_through(image),
        size=request.output_size(image),
        num_frames=num_frames(image),
    )
    _check_room(job, request.output_size(image))
    return image


def choose_target(job: Job, request: FileRequest) -> Job:
    """Take a job's alternative where its result does not fit its target's format."""
    from tadsr.images import check_format, is_see_through, read_facts, read_image

    if job.alternative is None:
        return job
    try:
        facts = read_facts(job.source, max_pixels=request.max_pixels)
        has_alpha = facts.may_be_transparent and request.background is None
        if has_alpha and facts.num_frames == 1:
            has_alpha = is_see_through(read_image(job.source, max_pixels=request.max_pixels))
        check_format(
            job.target,
            has_alpha=has_alpha,
            size=request.output_size_of(facts.size),
            num_frames=facts.num_frames,
        )
    except ImageWriteError as error:
        reason = str(error).removeprefix(f"{job.target}: ").partition(";")[0]
        note = f"{job.source}: becomes {job.alternative.name}, since {reason}"
        return replace(job, target=job.alternative, note=note)
    except TADSRError:
        pass  # `read_input` says what is wrong
    return job


def _check_room(job: Job, size: tuple[int, int]) -> None:
    """Raise unless memory and temporary files together can hold the result once."""
    import psutil

    needed = _LEAST_BYTES_PER_PIXEL * size[0] * size[1]
    room = psutil.virtual_memory().available + shutil.disk_usage(tempfile.gettempdir()).free
    if needed > room:
        raise TADSRError(
            f"{job.source}: the result would have {size[0]}×{size[1]} px, which takes at least "
            f"{needed / 1e9:.4g} GB of memory and temporary files to compute, but "
            f"{room / 1e9:.4g} GB are free; use a smaller scale"
        )


def num_frames(image: SourceImage) -> int:
    """Return the number of frames of an animation, 1 for a still image."""
    return len(getattr(image, "durations_ms", (0,)))


def note_about(job: Job, request: FileRequest) -> str:
    """Return what of a file is not read, or nothing."""
    from tadsr.images import find_losses

    notes = [job.note] if job.note else []
    return "\n".join([*notes, *find_losses(job.source, max_pixels=request.max_pixels)])


def restore(
    pipe: Restorer,
    image: SourceImage,
    job: Job,
    request: FileRequest,
    progress: Progress | None = None,
) -> Image.Image | ArrayImage | None:
    """Restore and enlarge one image; None where its file has been written on the way.

    Args:
        progress: Told the share that is done, 0..1.
    """
    from tadsr.images import STREAMED_SUFFIXES

    settings = request.settings_for(image)
    options = {"settings": settings, "prompt": request.prompt}
    if num_frames(image) > 1:
        _restore_frames(pipe, image, job, request, options, progress or (lambda share: None))
        return None
    options |= {"generator": _generator(request.seed), "progress": progress}
    width, height = request.output_size(image)
    is_streamed = job.target.suffix.lower() in STREAMED_SUFFIXES
    is_shrunk = request.size is not None and settings.scale == 1
    if height * width > STREAMED_PIXELS and is_streamed and not is_shrunk:
        may_replace = request.overwrite or job.may_replace
        pipe.upscale_to_file(image, job.target, request.timestep, overwrite=may_replace, **options)
        return None
    return _shrink(pipe(image, request.timestep, **options), (width, height))


def _shrink(image: Image.Image | ArrayImage, size: tuple[int, int]) -> Image.Image | ArrayImage:
    """Return a result at the size that was asked for; it is larger where the input was."""
    if image.size == size:
        return image
    from tadsr.images import resize_image

    return resize_image(image, size)


def images_at_once(pipe: Restorer, image: SourceImage, request: FileRequest) -> int:
    """Return how many images like this one `restore_together` takes, at least 1."""
    width, height = request.output_size(image)
    if num_frames(image) > 1 or request.seed is not None or height * width > STREAMED_PIXELS:
        return 1
    return pipe.images_at_once((image.size[1], image.size[0]), request.settings_for(image))


def restore_together(
    pipe: Restorer, images: Sequence[SourceImage], request: FileRequest
) -> list[Image.Image | ArrayImage]:
    """Restore images of one size in one go."""
    timestep = request.timestep
    if not isinstance(timestep, int | None):
        timestep = [timestep] * len(images)
    settings = request.settings_for(images[0])
    results = pipe(list(images), timestep, settings=settings, prompt=request.prompt)
    pairs = zip(results, images, strict=True)
    return [_shrink(result, request.output_size(image)) for result, image in pairs]


def _restore_frames(
    pipe: Restorer,
    animation: Animation,
    job: Job,
    request: FileRequest,
    options: dict[str, Any],
    progress: Progress,
) -> None:
    """Restore an animation into its file."""
    from tadsr.images import write_frames

    def results() -> Iterator[Image.Image]:
        for number, frame in enumerate(animation):
            progress(number / len(animation))
            # The same noise for each frame, so that a still scene does not flicker.
            generator = _generator(request.seed)
            result = pipe(frame, request.timestep, generator=generator, **options)
            yield _shrink(result, request.output_size(animation))

    write_frames(
        results(),
        job.target,
        durations_ms=animation.durations_ms,
        num_plays=animation.num_plays,
        **request.writing(job),
    )
    progress(1.0)


def _generator(seed: int | None) -> torch.Generator | None:
    """Start anew for each image, so that its result does not depend on the others."""
    import torch

    return None if seed is None else torch.Generator().manual_seed(seed)
