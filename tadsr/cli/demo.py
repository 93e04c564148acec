"""`tadsr demo`: a page in the browser."""

from __future__ import annotations

from typing import Annotated

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

DEMO_HELP = f"""Try models in the browser.

Needs {install("demo")}.

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


def demo(
    model: options.ModelsOption = None,
    device: options.DeviceOption = "auto",
    dtype: options.DtypeOption = "auto",
    host: options.HostOption = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", metavar="N", help="0: any that is free.")] = 7860,
    max_upload: options.MaxUploadOption = "50MB",
    max_pixels: options.MaxResultOption = 64,
    open_browser: Annotated[
        bool, typer.Option("--open/--no-open", help="Whether to open the page.")
    ] = False,
    debug: options.DebugOption = False,
) -> None:
    """Run `tadsr demo`."""
    check_range("--port", port, 0, 65535, "7860 is gradio's")
    check_range("--max-pixels", max_pixels, 1, 10_000, "megapixels of a result")
    with as_usage_errors():
        upload_bytes = parse_bytes(max_upload)
    with readable_errors(debug):
        with listen(host, port) as listener:  # gradio looks for one that is free by itself
            port = listener.getsockname()[1]
        try:
            import gradio  # noqa: F401
        except ImportError as error:
            raise UsageError(f"the demo needs gradio; {install('demo')}") from error
        silence_libraries(debug)
        models = hosted_models(model, device, dtype)

        from tadsr.demo.actions import DemoLimits
        from tadsr.demo.page import build

        page = build(models, DemoLimits(upload_bytes, max_pixels * 1_000_000))
        typer.echo(f"http://{host}:{port}, until Ctrl-C", err=True)
        page.launch(
            server_name=host,
            server_port=port,
            max_file_size=upload_bytes,
            inbrowser=open_browser,
            share=False,
            quiet=True,  # it would offer to share the page, which is not possible here
            footer_links=[],
        )
