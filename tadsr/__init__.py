"""Time-aware one-step diffusion for real-world image super-resolution."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tadsr.lazily import lazy_names
from tadsr.version import __version__

__all__ = [
    "ArrayImage",
    "CheckpointError",
    "DataError",
    "FileRequest",
    "ImageReadError",
    "ImageWriteError",
    "PromptEmbeddings",
    "TADSRError",
    "TADSRPipeline",
    "TADSRWarning",
    "TileSpec",
    "TimeAwareAutoencoderKL",
    "TimestepMap",
    "TrainingError",
    "UpscaleSettings",
    "__version__",
    "read_frames",
    "read_image",
    "upscale_folder",
    "write_frames",
    "write_image",
]

if TYPE_CHECKING:
    from tadsr.conditioning import TimestepMap
    from tadsr.config import UpscaleSettings
    from tadsr.errors import (
        CheckpointError,
        DataError,
        ImageReadError,
        ImageWriteError,
        TADSRError,
        TADSRWarning,
        TrainingError,
    )
    from tadsr.folders.restoring import FileRequest
    from tadsr.folders.upscale import upscale_folder
    from tadsr.images import ArrayImage, read_frames, read_image, write_frames, write_image
    from tadsr.networks.prompt_embeddings import PromptEmbeddings
    from tadsr.networks.time_aware_vae import TimeAwareAutoencoderKL
    from tadsr.pipeline import TADSRPipeline
    from tadsr.tile_spec import TileSpec


__getattr__ = lazy_names(
    __name__,
    {
        "diffusers": "ModelMixin",  # looked for beside the class that a saved pipeline names
        "tadsr.conditioning": "TimestepMap",
        "tadsr.config": "UpscaleSettings",
        "tadsr.errors": (
            "CheckpointError DataError ImageReadError ImageWriteError TADSRError TADSRWarning "
            "TrainingError"
        ),
        "tadsr.folders.restoring": "FileRequest",
        "tadsr.folders.upscale": "upscale_folder",
        "tadsr.images": "ArrayImage read_frames read_image write_frames write_image",
        "tadsr.networks.prompt_embeddings": "PromptEmbeddings",
        "tadsr.networks.time_aware_vae": "TimeAwareAutoencoderKL",
        "tadsr.pipeline": "TADSRPipeline",
        "tadsr.tile_spec": "TileSpec",
    },
)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
