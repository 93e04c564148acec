"""The models that `tadsr demo` and `tadsr serve` offer."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tadsr.checkpoints.detect import check_source
from tadsr.cli.devices import choose_device
from tadsr.cli.model_request import DtypeName, ModelRequest
from tadsr.cli.reporting import UsageError

if TYPE_CHECKING:
    from tadsr.demo.actions import Models
    from tadsr.restorer import Restorer

BUILT_IN = "tadsr-tiny"


def listen(host: str, port: int) -> socket.socket:
    """Take the port before a model is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UsageError(
            f"--host and --port must be free, but {host}:{port} cannot be listened on "
            f"({error.strerror}); take another port, or 0 for any that is free"
        ) from error


def hosted_models(names: Sequence[str] | None, device: str, dtype: DtypeName) -> Models:
    """Check models and a device, and return the models, each loaded when it is first asked for."""
    for name in names or ():
        check_source(name)
    place = choose_device(device)
    from tadsr.demo.actions import Models  # and with it torch

    def load(name: str) -> Restorer:
        return ModelRequest(name, dtype=dtype, timestep=0).load(place)

    return Models(names or [BUILT_IN], load)
