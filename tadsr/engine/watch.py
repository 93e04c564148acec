"""Whether networks are still what was folded and recorded."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from tadsr.engine.support import is_hooked


class ModuleWatch:
    """Notices when modules or their weights become other ones.

    Merging, loading, moving and casting are noticed, and so are attached adapters, hooks and
    attention processors. What torch does not count is not: values written through `.data`.

    Args:
        networks: Watched with all their submodules; half a millisecond for a thousand weights.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        modules = list({m: None for network in networks for m in network.modules()})
        self._children = [(m, tuple(m._modules.values())) for m in modules]
        self._parameters = [
            (m, tuple((p, _identity(p)) for p in m._parameters.values() if p is not None))
            for m in modules
            if m._parameters
        ]
        self._hooked = [is_hooked(m) for m in modules]
        self._processors = [(m, m.processor) for m in modules if isinstance(m, Attention)]
        # Weak: a weight that was replaced must be freed. Yet the storage's own address cannot be
        # taken by another while these exist, as a data pointer can.
        self._storages = [
            StorageWeakRef(p.untyped_storage()) for _, given in self._parameters for p, _ in given
        ]

    def is_current(self) -> bool:
        """Tell whether nothing has changed."""
        for (module, children), hooked in zip(self._children, self._hooked, strict=True):
            if tuple(module._modules.values()) != children or is_hooked(module) != hooked:
                return False
        for module, given in self._parameters:
            found = [p for p in module._parameters.values() if p is not None]
            if len(found) != len(given):
                return False
            for parameter, (known, identity) in zip(found, given, strict=True):
                if parameter is not known or _identity(parameter) != identity:
                    return False
        return all(module.processor is known for module, known in self._processors)


def _identity(parameter: Tensor) -> tuple[int, int, int]:
    # Tensors made in inference mode count no versions.
    version = -1 if parameter.is_inference() else parameter._version
    return version, parameter.untyped_storage()._cdata, parameter.data_ptr()
