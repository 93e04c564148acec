"""Time-aware one-step diffusion for real-world image super-resolution."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tadsr.version import __version__

# Public name -> module that defines it; resolved on first use so that `import tadsr` stays light.
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


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'tadsr' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
