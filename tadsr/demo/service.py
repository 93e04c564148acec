"""A small HTTP service: a photo in, a picture out (needs the extra `serve`).

Photos are computed one after the other. Requests are bounded before they are read, and wait in a
queue that is bounded as well.
"""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, get_args

from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from tadsr.config import ColorFix
from tadsr.demo.actions import Choices, DemoLimits, Models, restore, sentence_for
from tadsr.errors import CheckpointError, ImageWriteError, TADSRError
from tadsr.progress import Progress
from tadsr.version import __version__

FORM_BYTES = 64 * 1024
"""Of a request beside its photo."""
PHOTO_FIELDS = ("file", "image", "image[]")
"""What rembg's and OpenAI's clients call the photo."""
_WANTED = (
    f"the form must have a photo as {PHOTO_FIELDS[0]} (curl -F file=@photo.jpg), or the photo must "
    "be the body, as Content-Type: image/jpeg"
)
SPOOLED_BYTES = 1_000_000
"""Of a photo sent as the body; the rest of a larger one is kept on disk."""
RETRY_SECONDS = 10
LOOKING_SECONDS = 0.5
"""Between two looks whether a client that waits is still there."""
VALUES = ("timestep", "scale", "color_fix", "model", "prompt")
"""What a form or an address may hold beside the photo."""
EDIT_VALUES = {
    "n": "1",
    "response_format": "b64_json",
    "output_format": "png",
    "stream": "false",
    **dict.fromkeys(("size", "quality", "background"), "auto"),
}
"""What OpenAI's clients may say as well, and the only answer there is to it."""
ROUTES = f"""POST /api/upscale      a form with the photo as file=, or the photo itself;
                       {", ".join(VALUES)} in the form or the address
POST /v1/images/edits  the same for OpenAI's clients
GET  /v1/models, /health, /metrics
"""


class _CancelledError(Exception):
    """The client has gone, or the service stops."""


@dataclass(eq=False)
class Service:
    """Answers requests.

    Args:
        models: What clients choose from; the first is the default.
        limits: What is refused.
        max_waiting: Requests that are computed or wait; more are told to come back.
    """

    models: Models
    limits: DemoLimits
    max_waiting: int = 8
    _counts: Counter[str] = field(default_factory=Counter)
    """What /metrics tells."""

    def __post_init__(self) -> None:
        if self.max_waiting < 1:
            raise ValueError(f"max_waiting must be at least 1, got {self.max_waiting}")
        # One thread: a second photo would take the first one's memory and slow both.
        self._worker = ThreadPoolExecutor(1, "tadsr-serve")
        self._is_stopping = Event()
        self._folder = tempfile.TemporaryDirectory(prefix="tadsr-serve-")

    def stop(self) -> bool:
        """Cancel what waits, and what is computed in pieces; tell whether that was asked before."""
        was_asked = self._is_stopping.is_set()
        self._is_stopping.set()
        return was_asked

    def discard_photos(self) -> None:
        """Remove clients' photos and results, also of one that is computed."""
        shutil.rmtree(self._folder.name, ignore_errors=True)

    def app(self) -> Starlette:
        """Return the ASGI application."""
        return Starlette(
            routes=[
                Route("/", lambda _: PlainTextResponse(ROUTES)),
                Route("/health", lambda _: JSONResponse({"status": "ok", "version": __version__})),
                Route("/metrics", lambda _: PlainTextResponse(self._metrics())),
                Route("/v1/models", lambda _: JSONResponse(self._list())),
                Route("/api/upscale", self._upscale, methods=["POST"]),
                Route("/v1/images/edits", self._edit, methods=["POST"]),
            ],
            exception_handlers={HTTPException: _as_json},
        )

    def _metrics(self) -> str:
        """Return the counts as Prometheus reads them."""
        names = ("done", "failed", "refused", "cancelled")
        rows = [(f"{name}_total", "counter", str(self._counts[name])) for name in names]
        rows.append(("computing_seconds_total", "counter", f"{self._counts['seconds']:.3f}"))
        rows.append(("waiting", "gauge", str(self._counts["waiting"])))
        return "".join(f"# TYPE tadsr_{n} {kind}\ntadsr_{n} {value}\n" for n, kind, value in rows)

    def _list(self) -> dict[str, Any]:
        data = [{"id": name, "object": "model", "owned_by": "tadsr"} for name in self.models.names]
        return {"object": "list", "data": data}

    async def _upscale(self, request: Request) -> Response:
        """Answer with the PNG, or with events if the client accepts them."""
        photo, values = await self._read(request)
        for name in values:
            if name not in VALUES:
                raise self._refusal(422, f"{name} must be one of {', '.join(VALUES)}")
        compute = self._admit(photo, values)
        if "text/event-stream" in request.headers.get("accept", ""):
            return self._stream(compute)
        return Response(await self._answer(request, compute), media_type="image/png")

    async def _edit(self, request: Request) -> Response:
        """Answer as OpenAI's image edits do."""
        photo, values = await self._read(request)
        known = (*VALUES, *EDIT_VALUES, "user")
        for name, value in values.items():
            if value.lower() != EDIT_VALUES.get(name, value.lower()):
                raise self._refusal(400, f"{name} must be {EDIT_VALUES[name]}, got {value[:80]!r}")
            if name not in known:
                raise self._refusal(400, f"{name[:80]} must be one of {', '.join(known)}")
        png = await self._answer(request, self._admit(photo, values))
        encoded = base64.b64encode(png).decode()
        return JSONResponse({"created": int(time.time()), "data": [{"b64_json": encoded}]})

    async def _read(self, request: Request) -> tuple[UploadFile, Mapping[str, Any]]:
        """Return a request's photo and its other values, from the form or the address."""
        length = request.headers.get("content-length", "")
        # A body in chunks ends where it likes, whatever length was said.
        if not length.isdecimal() or "transfer-encoding" in request.headers:
            raise self._refusal(411, "a request must say its Content-Length, and send no chunks")
        if int(length) > self.limits.max_upload_bytes + FORM_BYTES:
            most = self.limits.max_upload_bytes / 1e6
            raise self._refusal(413, f"a photo must have at most {most:g} MB here")
        kind = request.headers.get("content-type", "none").partition(";")[0].strip().lower()
        try:
            if kind.startswith("image/") or kind == "application/octet-stream":
                photo = UploadFile(tempfile.SpooledTemporaryFile(SPOOLED_BYTES))  # noqa: SIM115
                async for chunk in request.stream():
                    await photo.write(chunk)
                await photo.seek(0)
                return photo, dict(request.query_params)
            if kind != "multipart/form-data":
                raise self._refusal(415, f"{_WANTED}; got Content-Type {kind}")
            form = await request.form(max_files=1, max_fields=32, max_part_size=FORM_BYTES)
        except ClientDisconnect as error:
            raise self._refusal(400, "the client has gone before its photo was sent") from error
        for name in PHOTO_FIELDS:
            if isinstance(form.get(name), UploadFile):
                values = {k: v for k, v in form.items() if isinstance(v, str)}
                return form[name], dict(request.query_params) | values
        raise self._refusal(422, f"{_WANTED}; got {', '.join(form)[:80] or 'nothing'}")

    def _admit(self, photo: UploadFile, values: Mapping[str, Any]) -> Callable[[Progress], bytes]:
        """Check a request and return what computes it."""
        try:
            choices = _choices(values)
            name = values.get("model") or self.models.names[0]
            if name not in self.models.names:
                raise ValueError(f"model must be one of {', '.join(self.models.names)}")
        except ValueError as error:
            raise self._refusal(422, str(error)) from error
        if self._counts["waiting"] >= self.max_waiting:
            raise self._refusal(503, "too many photos are waiting; come back", RETRY_SECONDS)
        return partial(self._compute, photo, name, choices)

    def _compute(
        self, photo: UploadFile, model: str, choices: Choices, progress: Progress
    ) -> bytes:
        progress(0)
        with tempfile.TemporaryDirectory(dir=self._folder.name) as folder:
            # Of a client's name only the kind of file is taken; without one its bytes tell.
            suffix = Path((photo.filename or "").replace("\0", "")).suffix.lower()[:8] or ".png"
            path = Path(folder) / f"photo{suffix}"
            path.write_bytes(photo.file.read())
            begin = time.monotonic()
            pipe = self.models.get(model)
            found = restore(
                pipe, path, choices, Path(folder), limits=self.limits, progress=progress
            )
            self._counts["seconds"] += time.monotonic() - begin
            return found.file.read_bytes()

    async def _answer(self, request: Request, compute: Callable[[Progress], bytes]) -> bytes:
        """Compute a photo, unless its client goes meanwhile."""
        gone = Event()
        task = self._start(compute, gone)
        while not (await asyncio.wait({task}, timeout=LOOKING_SECONDS))[0]:
            if await request.is_disconnected():
                gone.set()
        return task.result()

    def _start(
        self,
        compute: Callable[[Progress], bytes],
        gone: Event,
        progress: Progress = lambda share: None,
    ) -> asyncio.Task[bytes]:
        """Have a photo computed in its turn, until its client has gone."""
        # Counted before the loop answers anyone else, so that no more wait than may.
        self._counts["waiting"] += 1

        def tell(share: float) -> None:
            if gone.is_set() or self._is_stopping.is_set():
                raise _CancelledError
            progress(share)

        return asyncio.ensure_future(self._run(partial(compute, tell)))

    async def _run(self, compute: Callable[[], bytes]) -> bytes:
        try:
            png = await asyncio.get_running_loop().run_in_executor(self._worker, compute)
        except _CancelledError as error:
            self._counts["cancelled"] += 1
            raise HTTPException(503, "stopped before the photo was done") from error
        except Exception as error:
            self._counts["failed"] += 1
            is_ours = isinstance(error, CheckpointError | ImageWriteError)
            is_clients = isinstance(error, TADSRError | ValueError | TypeError) and not is_ours
            raise HTTPException(422 if is_clients else 500, sentence_for(error)) from error
        finally:
            self._counts["waiting"] -= 1
        self._counts["done"] += 1
        return png

    def _stream(self, compute: Callable[[Progress], bytes]) -> StreamingResponse:
        """Answer with server-sent events: progress, then the result or an error."""
        loop, shares, gone = asyncio.get_running_loop(), asyncio.Queue(), Event()

        def tell(share: float) -> None:
            loop.call_soon_threadsafe(shares.put_nowait, share)

        def end(task: asyncio.Task[bytes]) -> None:
            if not task.cancelled():
                task.exception()  # asyncio would log one that nobody asked for
            shares.put_nowait(None)

        async def events() -> AsyncIterator[str]:
            try:
                while (share := await shares.get()) is not None:
                    yield _event("progress", {"share": round(share, 4)})
                try:
                    yield _event("result", {"b64_json": base64.b64encode(task.result()).decode()})
                except HTTPException as error:
                    yield _event("error", {"error": error.detail, "status": error.status_code})
            finally:
                gone.set()

        task = self._start(compute, gone, tell)
        task.add_done_callback(end)
        return StreamingResponse(events(), media_type="text/event-stream")

    def _refusal(self, status: int, message: str, retry_s: int | None = None) -> HTTPException:
        self._counts["refused"] += 1
        headers = None if retry_s is None else {"Retry-After": str(retry_s)}
        return HTTPException(status, message, headers)


def _choices(values: Mapping[str, Any]) -> Choices:
    given = {name: values[name] for name in ("prompt", "color_fix") if name in values}
    for name in ("timestep", "scale"):
        try:
            given |= {name: float(values[name])} if name in values else {}
        except ValueError as error:
            raise ValueError(f"{name} must be a number, got {values[name]!r}") from error
    if "timestep" in given:
        timestep = given["timestep"]
        if not (timestep.is_integer() and 0 <= timestep <= 999):
            raise ValueError(f"timestep must be a whole number in 0..999, got {timestep:g}")
        given["timestep"] = int(timestep)
    if given.get("color_fix", "none") not in get_args(ColorFix):
        raise ValueError(f"color_fix must be one of {', '.join(get_args(ColorFix))}")
    return Choices(**given)


def _event(name: str, data: Mapping[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


async def _as_json(request: Request, error: Exception) -> Response:
    status, detail = getattr(error, "status_code", 500), getattr(error, "detail", "")
    if status in (404, 405):
        detail = f"{request.method} {request.url.path} has no answer here; GET / lists what has"
    headers = getattr(error, "headers", None)
    return JSONResponse({"error": {"message": detail}}, status, headers=headers)
