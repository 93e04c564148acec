"""Errors that are ours; wrong arguments raise ValueError or TypeError instead."""

from __future__ import annotations

import importlib
from types import ModuleType

_LONGEST = 4000
"""Letters of a message, which may quote what a file names."""
_LAST = 300
"""Of these, the last ones, which say what to do."""


class TADSRError(Exception):
    """Base of every error that tadsr raises about files, images and checkpoints."""

    def __str__(self) -> str:
        text = super().__str__()
        return text if len(text) <= _LONGEST else f"{text[: _LONGEST - _LAST]} … {text[-_LAST:]}"


class CheckpointError(TADSRError):
    """A checkpoint is missing, damaged, unsafe or does not fit the model."""


class ImageReadError(TADSRError):
    """An image file cannot be read: missing, broken, truncated or too large."""


class ImageTooLargeError(ImageReadError):
    """An image file would take more memory or time than was allowed."""


class TADSRWarning(UserWarning):
    """Base of tadsr's warnings: the request is carried out, but in another way."""


class ImageReadWarning(TADSRWarning):
    """A file holds more images than the one that was read."""


class ImageWriteError(TADSRError):
    """An image cannot be written: unwritable place, unknown format or existing file."""


class Terminated(KeyboardInterrupt):
    """SIGTERM came, as from `docker stop`, slurm or systemd."""


class TrainingError(TADSRError):
    """A training run cannot go on, or its folder is another run's."""


class DataError(TADSRError):
    """Training data cannot be used at all, or its library is not installed."""


def reason_of(error: Exception) -> str:
    """Return in a line what the system or another library says of an error of its own."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"


def not_finite(dtype: object) -> TADSRError:
    """Return the error for a result with NaN or infinity."""
    return TADSRError(
        f"the result must be finite, got NaN or infinity at {dtype}; load the model with "
        "torch_dtype=torch.bfloat16 or torch.float32 (--dtype)"
    )


def install(extra: str) -> str:
    """Return the command that brings what an extra needs.

    It works wherever tadsr itself came from: pip keeps the one that is installed.
    """
    return f"pip install 'tadsr[{extra}]'"


def import_extra(
    module: str, needs: str, extra: str, otherwise: str = "", error: type[TADSRError] = TADSRError
) -> ModuleType:
    """Import a library that comes with an extra, or say what needs it and how to install it."""
    try:
        return importlib.import_module(module)
    except Exception as caught:  # a torchvision built for another torch raises RuntimeError
        how = f"install it with {install(extra)}{otherwise}"
        raise error(f"{needs}, which does not import ({caught}); {how}") from caught
