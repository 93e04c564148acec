"""`tadsr demo` and `tadsr serve`: a page in the browser, and a small HTTP service."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import typer

from tadsr.checkpoints.detect import check_source
from tadsr.cli import options
from tadsr.cli.model import DtypeName, ModelRequest, choose_device
from tadsr.cli.reporting import UsageError, parse_bytes
from tadsr.errors import install

if TYPE_CHECKING:
    from tadsr.demo.actions import DemoLimits, Models
    from tadsr.restorer import Restorer

_HOST = options.option("127.0.0.1", "--host ADDRESS", "0.0.0.0: for other machines too.")
_MAX_UPLOAD = options.option(
    "50MB", "--max-upload SIZE", "Largest file, such as 50MB.", parser=parse_bytes
)
_MAX_RESULT = options.option(
    64,
    "--max-pixels N",
    "Largest result in megapixels.",
    callback=options.within(1, 10_000, "megapixels of a result"),
)


def _port(default: int, hint: str) -> Any:
    return options.option(
        default, "--port N", "0: any that is free.", callback=options.within(0, 65535, hint)
    )


def demo(
    model: list[str] | None = options.MODELS,
    device: str = options.DEVICE,
    dtype: DtypeName = options.DTYPE,
    host: str = _HOST,
    port: int = _port(7860, "7860 is gradio's"),
    max_upload: int = _MAX_UPLOAD,
    max_pixels: int = _MAX_RESULT,
    open_browser: bool = options.option(False, "--open/--no-open", "Whether to open the page."),
    debug: bool = options.DEBUG,
) -> None:
    """Try models in the browser.

    Needs pip install 'tadsr[demo]'.

    \b
    Opens a page on this machine, at http://127.0.0.1:7860, and works without a
    network. With --host 0.0.0.0 others reach it as well; they choose among the
    models named here, and their photos are computed one after the other.

    \b
    Examples:
      tadsr demo
      tadsr demo -m tadsr-tiny -m runs/mine/model
      tadsr demo --host 0.0.0.0 --port 80 --max-upload 20MB --max-pixels 20
    """
    with _listen(host, port) as listener:  # gradio looks for one that is free by itself
        port = listener.getsockname()[1]
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise UsageError(f"the demo needs gradio; {install('demo')}") from error
    models = _hosted_models(model, device, dtype)

    from tadsr.demo.page import build

    page = build(models, _limits(max_upload, max_pixels))
    typer.echo(f"http://{host}:{port}, until Ctrl-C", err=True)
    page.launch(
        server_name=host,
        server_port=port,
        max_file_size=max_upload,
        inbrowser=open_browser,
        share=False,
        quiet=True,  # it would offer to share the page, which is not possible here
        footer_links=[],
    )


def serve(
    model: list[str] | None = options.MODELS,
    device: str = options.DEVICE,
    dtype: DtypeName = options.DTYPE,
    host: str = _HOST,
    port: int = _port(7000, "7000 is what rembg takes"),
    max_upload: int = _MAX_UPLOAD,
    max_pixels: int = _MAX_RESULT,
    max_waiting: int = options.option(
        8,
        "--max-waiting N",
        "Photos that are computed or wait.",
        callback=options.within(1, 10_000, "further ones are told to come back"),
    ),
    debug: bool = options.DEBUG,
) -> None:
    """Restore photos over HTTP.

    Needs pip install 'tadsr[serve]'.

    \b
    POST /api/upscale       form with file=, or the photo itself; timestep=, scale=,
                            color_fix=, model=, prompt= in the form or in the
                            address; gives a PNG.
                            Accept: text/event-stream gives progress and result.
    POST /v1/images/edits   the same as OpenAI's clients ask for it
    GET  /v1/models, /health, /metrics

    \b
    It listens on this machine alone. With --host 0.0.0.0 others reach it as well:
    put a proxy before it that limits and authenticates.

    \b
    Examples:
      tadsr serve
      curl -F file=@photo.jpg 'localhost:7000/api/upscale?timestep=200' -o x4.png
    """
    try:
        import python_multipart  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise UsageError(f"{error}; {install('serve')}") from error
    models = _hosted_models(model, device, dtype)
    listener = _listen(host, port)

    from tadsr.demo.service import Service

    models.get(models.names[0])  # before anyone waits for it
    service = Service(models, _limits(max_upload, max_pixels), max_waiting)
    port = listener.getsockname()[1]
    typer.echo(f"http://{host}:{port}/api/upscale, until Ctrl-C", err=True)

    class Server(uvicorn.Server):
        def handle_exit(self, *signal: Any) -> None:
            if service.stop():  # the photo's thread cannot be ended otherwise
                service.discard_photos()
                os._exit(130)
            typer.echo("Stopping after a photo in work; Ctrl-C again: at once.", err=True)
            super().handle_exit(*signal)

    server = Server(uvicorn.Config(service.app(), log_level="warning", server_header=False))
    with suppress(KeyboardInterrupt):  # uvicorn raises it once all is closed
        server.run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    """Take the port before a model is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UsageError(
            f"--host and --port must be free, but {host}:{port} cannot be listened on "
            f"({error.strerror}); take another port, or 0 for any that is free"
        ) from error


def _hosted_models(names: Sequence[str] | None, device: str, dtype: DtypeName) -> Models:
    """Check models and a device, and return the models, each loaded when it is first asked for."""
    names = names or ["tadsr-tiny"]
    for name in names:
        check_source(name)
    place = choose_device(device)
    from tadsr.demo.actions import Models  # and with it torch

    def load(name: str) -> Restorer:
        return ModelRequest(name, dtype=dtype, timestep=0).load(place)

    return Models(names, load)


def _limits(max_upload: int, megapixels: int) -> DemoLimits:
    from tadsr.demo.actions import DemoLimits

    return DemoLimits(max_upload, megapixels * 1_000_000)
