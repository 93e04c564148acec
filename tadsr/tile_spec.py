"""How a large image is cut into bands."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20
WHOLE_ATTENTION_PIXELS = 2048 * 2048
"""Above this area of the output every position attending to all others costs more than all else,
and is far from the sizes that students are trained at."""
ATTENTION_STEP_PX = 128
"""Windows of attention are whole numbers of this wide, for every level of the UNet."""
MIN_BAND_BYTES = MIB // 4
"""Smallest working set of a layer that is any use."""


@dataclass(frozen=True)
class TileSpec:
    """Sizes of the pieces that a large image is computed in.

    The cut does not show: layers are computed band by band with their real neighbours and with
    the whole image's statistics, so that only `attention_px` changes the result.
    """

    band_bytes: int | None = None
    """Working set of a layer's band in bytes, at least 256 KiB; None for 8 MiB on the CPU, where
    a band should fit its caches, and 256 MiB elsewhere."""
    max_memory: int | None = None
    """Bytes that the process may hold on the device, everything included; None for most of what
    is available. Activations beyond it wait in host memory beside an accelerator, and in a
    temporary file beside the CPU. A floor of the weights and some bands is always taken."""
    attention_px: int | None = None
    """Side in output px of the windows in which the UNet attends to itself, a multiple of 128;
    0 lets every position attend to all others, at a cost that grows with the area squared; None
    takes 0 up to an output of 2048 × 2048 px and 768 above."""

    def __post_init__(self) -> None:
        if self.band_bytes is not None and self.band_bytes < MIN_BAND_BYTES:
            raise ValueError(
                f"band_bytes must be at least {MIN_BAND_BYTES} (256 KiB) or None, "
                f"got {self.band_bytes}"
            )
        if self.max_memory is not None and self.max_memory <= 0:
            raise ValueError(f"max_memory must be above 0 bytes or None, got {self.max_memory}")
        side = self.attention_px
        if side is not None and (side < 0 or side % ATTENTION_STEP_PX):
            raise ValueError(
                f"attention_px must be a multiple of {ATTENTION_STEP_PX} px, 0 or None, got {side}"
            )

    def attention_px_for(self, height: int, width: int) -> int:
        """Return the side of the attention's windows for an output of that many px."""
        if self.attention_px is not None:
            return self.attention_px
        return 0 if height * width <= WHOLE_ATTENTION_PIXELS else 768

    def band_bytes_on(self, device_type: str) -> int:
        """Return the working set for a kind of device, such as "cpu"."""
        return self.band_bytes or (8 * MIB if device_type == "cpu" else 256 * MIB)
