"""Whether images are computed as a whole or in bands, and why."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tadsr.config import UpscaleSettings
from tadsr.onestep.banded import planned_bytes
from tadsr.onestep.conditions import Conditions
from tadsr.onestep.memory import available_bytes
from tadsr.onestep.step import OneStepEngine
from tadsr.onestep.support import check_unet
from tadsr.tile_spec import MIB, WHOLE_ATTENTION_PIXELS, TileSpec

FUSED_MEMORY_FACTOR = 1.8
"""Peak memory of the whole over what bands keep between layers: measured 1.2 to 1.55 on a CPU with
tadsr-tiny at 512² to 1024² px."""
PLAIN_MEMORY_FACTOR = 3.2
"""The same of plain modules: measured 1.8 to 2.8."""
_SHARE_OF_AVAILABLE = 0.7


@dataclass(frozen=True)
class Way:
    """How images are computed."""

    spec: TileSpec | None
    """Sizes of the pieces; None for the images as a whole."""
    reason: str
    """Why, as part of a sentence."""


def choose_way(
    engine: OneStepEngine, conditions: Conditions, rgb: Tensor, settings: UpscaleSettings
) -> Way:
    """Decide whether images are computed in pieces.

    Left to itself this is only where the whole does not fit: where it does it is the fastest, on a
    CPU as on a GPU.

    Args:
        rgb: Images, (B, 3, h, w).
    """
    tiling = settings.tiling
    if tiling is not None and tiling != "auto" and not isinstance(tiling, TileSpec):
        raise TypeError(f'tiling must be "auto", None or a TileSpec, got {tiling!r}')
    if tiling is None:
        return Way(None, "tiling is None")
    if not can_be_cut(rgb, settings):
        return Way(None, "images that are enlarged for the networks are small")
    if isinstance(tiling, TileSpec):
        check_unet(engine.unet)
        return Way(tiling, "a TileSpec is given")
    try:
        check_unet(engine.unet)
    except ValueError:
        return Way(None, "the UNet has blocks that bands do not know")
    height, width = settings.output_size(*rgb.shape[-2:])
    if height * width > WHOLE_ATTENTION_PIXELS:
        reason = f"its {width} × {height} px are more than the UNet attends to at once"
    else:
        factor = FUSED_MEMORY_FACTOR if engine.is_fused else PLAIN_MEMORY_FACTOR
        needed = int(factor * planned_bytes(engine, conditions, rgb, settings))
        # Of the graphs' memory torch says that it can be used again.
        available = available_bytes(conditions.device) - engine.graph_bytes
        room = int(_SHARE_OF_AVAILABLE * available)
        if needed <= room:
            return Way(None, f"about {needed // MIB} MiB fit into the {room // MIB} there are")
        reason = f"the whole would take about {needed // MIB} MiB of {room // MIB} there are"
    return Way(TileSpec(), reason)


def can_be_cut(rgb: Tensor, settings: UpscaleSettings) -> bool:
    """Tell whether images (B, 3, h, w) can be computed in pieces.

    What is enlarged for the network cannot, and is small.
    """
    size = rgb.shape[-2:]
    return settings.network_size(*size) == settings.output_size(*size)
