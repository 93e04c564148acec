"""Nodes for ComfyUI: load a TADSR model, and restore images with it.

Copy this folder into ComfyUI/custom_nodes as `tadsr_nodes`, and install tadsr from a checkout with
the Python that runs ComfyUI: `python -m pip install /path/to/tadsr`. The nodes are under
image/upscaling. Models of your own are found in ComfyUI/models/tadsr, a folder each.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F

from tadsr import TADSRPipeline, TimestepMap
from tadsr.checkpoints.detect import EMBEDDED
from tadsr.config import ColorFix
from tadsr.onestep import TileSpec

try:
    from comfy import model_management
    from comfy.utils import ProgressBar
except ImportError:  # outside ComfyUI, as in this library's tests
    model_management = ProgressBar = None
try:
    import folder_paths
except ImportError:
    folder_paths = None

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
GIGABYTE = 10**9
PROGRESS_STEPS = 1000
SMALL_IMAGES = "results whose shorter side is below this are computed at it; -1: the model's own"
ATTENTION_PX = {"auto": None, "512": 512, "1024": 1024, "everywhere": 0}
"""How far a place of a large result looks around; see `TileSpec.attention_px`."""


def _own_models() -> Path | None:
    """Return ComfyUI's folder of TADSR models, if there is one."""
    folder = None if folder_paths is None else Path(folder_paths.models_dir) / "tadsr"
    return folder if folder is not None and folder.is_dir() else None


class LoadTADSR:
    """Loads a model."""

    DESCRIPTION = "Loads a TADSR model: the package's own, one of models/tadsr, or another source."

    CATEGORY = "image/upscaling"
    RETURN_TYPES = ("TADSR_MODEL",)
    RETURN_NAMES = ("model",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """Describe the inputs as ComfyUI wants it."""
        folder = _own_models()
        own = [] if folder is None else sorted(p.name for p in folder.iterdir() if p.is_dir())
        name = {"tooltip": "the package's own, then the folders in ComfyUI/models/tadsr"}
        source = {"default": "", "tooltip": "instead: a folder, or a hub id owner/name"}
        return {
            "required": {"name": ([*EMBEDDED, *own], name), "dtype": (["auto", *DTYPES],)},
            "optional": {"source": ("STRING", source)},
        }

    def load(self, name: str, dtype: str, source: str = "") -> tuple[TADSRPipeline]:
        """Load the model onto ComfyUI's device."""
        folder = _own_models()
        if not source and folder is not None and (folder / name).is_dir():
            source = str(folder / name)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if model_management is not None:
            device = torch.device(model_management.get_torch_device())
        if dtype == "auto":
            dtype = "fp16" if device.type == "cuda" else "fp32"
        return (
            TADSRPipeline.from_pretrained(source or name, torch_dtype=DTYPES[dtype]).to(device),
        )


class UpscaleTADSR:
    """Restores and enlarges images; a mask may give a part of them another timestep."""

    DESCRIPTION = (
        "Restores and enlarges images in one step. A small timestep stays faithful, a large one "
        "is vivid; where the mask is 1, masked_timestep holds instead."
    )
    CATEGORY = "image/upscaling"
    RETURN_TYPES = ("IMAGE", "MASK")
    FUNCTION = "upscale"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """Describe the inputs as ComfyUI wants it."""
        timestep: dict[str, Any] = {"default": 500, "min": 0, "max": 999}
        hint = "small: faithful, large: vivid"
        memory = {"default": 0.0, "min": 0.0, "max": 1024.0, "tooltip": "0: what is free"}
        process_size = {"default": -1, "min": -1, "max": 4096}
        return {
            "required": {
                "model": ("TADSR_MODEL",),
                "image": ("IMAGE",),
                "timestep": ("INT", timestep | {"tooltip": hint}),
                "scale": ("FLOAT", {"default": 4.0, "min": 1.0, "max": 16.0, "step": 0.5}),
                "color_fix": (list(get_args(ColorFix)),),
                "process_size": ("INT", process_size | {"tooltip": SMALL_IMAGES}),
                "max_memory_gb": ("FLOAT", memory),
                "attention_px": (list(ATTENTION_PX),),
                "prompt": ("STRING", {"default": "", "multiline": True}),
            },
            "optional": {
                "mask": ("MASK",),
                "masked_timestep": (
                    "INT",
                    timestep | {"default": 1, "tooltip": "where the mask is 1"},
                ),
                "alpha": ("MASK", {"tooltip": "the MASK of Load Image: 1 where it is transparent"}),
            },
        }

    def upscale(
        self,
        model: TADSRPipeline,
        image: torch.Tensor,
        timestep: int,
        scale: float,
        color_fix: ColorFix,
        process_size: int,
        max_memory_gb: float,
        attention_px: str,
        prompt: str,
        mask: torch.Tensor | None = None,
        masked_timestep: int = 1,
        alpha: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Restore images (B, H, W, 3) in [0, 1], and enlarge what of them is transparent."""
        tiling: TileSpec | str = "auto"
        if max_memory_gb > 0 or attention_px != "auto":
            memory = int(max_memory_gb * GIGABYTE) or None
            tiling = TileSpec(max_memory=memory, attention_px=ATTENTION_PX[attention_px])
        timesteps: list[Any] = [timestep] * len(image)
        if mask is not None:
            masks = mask if mask.ndim == 3 else mask[None]
            if len(masks) not in (1, len(image)):
                raise ValueError(f"there must be 1 mask or {len(image)}, got {len(masks)}")
            ends = (timestep, masked_timestep)
            maps = [TimestepMap.from_image(m.clamp(0, 1).cpu().numpy(), ends) for m in masks]
            timesteps = maps * (len(image) // len(maps))
        image = image.clamp(0, 1)  # other nodes overshoot
        if alpha is not None:
            clear = (alpha if alpha.ndim == 3 else alpha[None]).clamp(0, 1).to(image)
            clear = F.interpolate(clear[:, None], image.shape[1:3], mode="bilinear")
            opaque = (1 - clear).movedim(1, -1).expand(len(image), -1, -1, -1)
            image = torch.cat([image[..., :3], opaque], -1)
        results = model(
            [one.float().cpu().numpy() for one in image],
            timesteps,
            scale=scale,
            prompt=prompt,
            color_fix=color_fix,
            process_size=None if process_size < 0 else process_size,
            tiling=tiling,
            progress=_progress(),
        )
        pixels = torch.from_numpy(np.stack(results))  # [B, H, W, 3 or 4]
        clear = torch.zeros(pixels.shape[:3]) if pixels.shape[-1] == 3 else 1 - pixels[..., 3]
        return pixels[..., :3].contiguous(), clear


def _progress() -> Callable[[float], None] | None:
    """Move ComfyUI's bar, and stop where its user has cancelled."""
    if model_management is None:
        return None
    bar = ProgressBar(PROGRESS_STEPS)

    def report(share: float) -> None:
        model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(round(PROGRESS_STEPS * share), PROGRESS_STEPS)

    return report


NODE_CLASS_MAPPINGS = {"LoadTADSR": LoadTADSR, "UpscaleTADSR": UpscaleTADSR}
NODE_DISPLAY_NAME_MAPPINGS = {"LoadTADSR": "Load TADSR", "UpscaleTADSR": "Upscale (TADSR)"}
