"""Time-aware one-step diffusion for real-world image super-resolution."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tadsr.lazily import lazy_names
from tadsr.version import __version__

# Public name -> module that defines it.
_EXPORTS = {
    "TADSRError": "tadsr.errors",
    "TADSRPipeline": "tadsr.pipeline",
    "TADSRWarning": "tadsr.errors",
    "TimeAwareAutoencoderKL": "tadsr.networks.time_aware_vae",
    "TimestepMap": "tadsr.conditioning",
}

__all__ = [
    "TADSRError",
    "TADSRPipeline",
    "TADSRWarning",
    "TimeAwareAutoencoderKL",
    "TimestepMap",
    "__version__",
]

if TYPE_CHECKING:
    from tadsr.conditioning import TimestepMap
    from tadsr.errors import TADSRError, TADSRWarning
    from tadsr.networks.time_aware_vae import TimeAwareAutoencoderKL
    from tadsr.pipeline import TADSRPipeline


__getattr__ = lazy_names(__name__, _EXPORTS)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
