"""Time-aware one-step diffusion for real-world image super-resolution."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tadsr.lazily import lazy_names
from tadsr.version import __version__

# Public name -> module that defines it.
_EXPORTS = {
    "ArrayImage": "tadsr.images",
    "CheckpointError": "tadsr.errors",
    "DataError": "tadsr.errors",
    "FileRequest": "tadsr.folders.restoring",
    "ImageReadError": "tadsr.errors",
    "ImageWriteError": "tadsr.errors",
    "PromptEmbeddings": "tadsr.networks.prompt_embeddings",
    "TADSRError": "tadsr.errors",
    "TADSRPipeline": "tadsr.pipeline",
    "TADSRWarning": "tadsr.errors",
    "TileSpec": "tadsr.tile_spec",
    "TimeAwareAutoencoderKL": "tadsr.networks.time_aware_vae",
    "TimestepMap": "tadsr.conditioning",
    "TrainingError": "tadsr.errors",
    "UpscaleSettings": "tadsr.config",
    "read_frames": "tadsr.images",
    "read_image": "tadsr.images",
    "upscale_folder": "tadsr.folders.upscale",
    "write_frames": "tadsr.images",
    "write_image": "tadsr.images",
}

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


# diffusers looks for the base class beside the class that a saved pipeline names.
__getattr__ = lazy_names(__name__, _EXPORTS | {"ModelMixin": "diffusers"})


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
