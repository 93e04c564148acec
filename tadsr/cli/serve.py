"""`tadsr serve`: a small HTTP service."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Annotated, Any

import typer

from tadsr.cli import options
from tadsr.cli.hosting import hosted_models, listen
from tadsr.cli.reporting import (
    UsageError,
    as_usage_errors,
    check_range,
    parse_bytes,
    readable_errors,
    silence_libraries,
)
from tadsr.errors import install

SERVE_HELP = f"""Restore photos over HTTP.

Needs {install("serve")}.

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


def serve(
    model: options.ModelsOption = None,
    device: options.DeviceOption = "auto",
    dtype: options.DtypeOption = "auto",
    host: options.HostOption = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", metavar="N", help="0: any that is free.")] = 7000,
    max_upload: options.MaxUploadOption = "50MB",
    max_pixels: options.MaxResultOption = 64,
    max_waiting: Annotated[
        int, typer.Option("--max-waiting", metavar="N", help="Photos that are computed or wait.")
    ] = 8,
    debug: options.DebugOption = False,
) -> None:
    """Run `tadsr serve`."""
    check_range("--port", port, 0, 65535, "7000 is what rembg takes")
    check_range("--max-pixels", max_pixels, 1, 10_000, "megapixels of a result")
    check_range("--max-waiting", max_waiting, 1, 10_000, "further ones are told to come back")
    with as_usage_errors():
        upload_bytes = parse_bytes(max_upload)
    with readable_errors(debug):
        try:
            import python_multipart  # noqa: F401
            import starlette  # noqa: F401
            import uvicorn
        except ImportError as error:
            raise UsageError(f"{error}; {install('serve')}") from error
        silence_libraries(debug)
        models = hosted_models(model, device, dtype)
        listener = listen(host, port)

        from tadsr.demo.actions import DemoLimits
        from tadsr.demo.service import Service

        models.get(models.names[0])  # before anyone waits for it
        service = Service(models, DemoLimits(upload_bytes, max_pixels * 1_000_000), max_waiting)
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
