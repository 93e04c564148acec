"""Restoration networks of others, to learn from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tadsr.checkpoints.tensor_files import TensorReader, read_pickle
from tadsr.errors import CheckpointError, import_extra

Restorer = Callable[[Tensor], Tensor]
"""A restoration network: RGB (B, 3, h, w) in [0, 1] to (B, 3, scale·h, scale·w), about [0, 1]."""


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
