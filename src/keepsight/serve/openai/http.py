"""HTTP as the routes need it: bounded bodies, disconnects, event streams, and a guard around everything."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from keepsight.serve.errors import ApiError, cut_off, log_error, too_large
from keepsight.serve.metrics import Metrics
from keepsight.serve.openai.settings import Limits, ServeSettings

log = logging.getLogger("keepsight.serve")

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class Gone(Exception):
    """The client has left; nobody reads an answer."""


def error_response(error: ApiError) -> JSONResponse:
    """An error as JSON."""
    return JSONResponse(error.body, error.status, headers=error.headers)


def require_json(request: Request) -> None:
    """Raise 415 for a body of another type: JSON no web page can send to another host without asking first."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "Send JSON, with Content-Type: application/json.", code="unsupported_media_type")


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body of a request.

    Raises:
        ApiError: 413 if it is too large, 408 if it comes too slowly.
        Gone: if the client leaves.
    """
    try:
        return await asyncio.wait_for(_read(request, limits.max_body_bytes), limits.read_seconds)
    except asyncio.TimeoutError:
        raise ApiError(
            408, f"The request took more than {limits.read_seconds:g} seconds to arrive.", code="request_timeout"
        ) from None


async def _read(request: Request, most: int, keep: bool = True) -> bytes:
    pieces: list[bytes] = []
    size = 0
    try:
        async for piece in request.stream():
            size += len(piece)
            if size > 4 * most:
                break
            if size > most:
                # What follows is thrown away and not refused at once: a client that is still sending would see a
                # broken connection and not the answer. Up to a point.
                pieces.clear()
            elif keep:
                pieces.append(piece)
    except ClientDisconnect:
        raise Gone from None
    if size > most:
        raise too_large(f"The request has more than {most:,} bytes.", code="request_too_large")
    return b"".join(pieces)


async def discard_body(request: Request, limits: Limits) -> None:
    """Read and forget the body of a request that is refused, so that the client sees the answer and no broken pipe."""
    with contextlib.suppress(ApiError, Gone, asyncio.TimeoutError):
        await asyncio.wait_for(_read(request, limits.max_body_bytes, keep=False), min(10.0, limits.read_seconds))


async def until_gone(receive: Receive) -> None:
    """Wait until the client has disconnected. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events, until all are sent, or the client leaves or reads too slowly.

    Args:
        events: objects to send as JSON.
        seconds: how long a client may take to read one piece.
        close: called at the end, whatever the end is.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[dict[str, Any], None], seconds: float, close: Callable[[], None]):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._seconds, self._close = events, seconds, close

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send everything."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self._events:
                await self._write(send, f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode(), True)
            await self._write(send, b"data: [DONE]\n\n", True)
            await self._write(send, b"", False)
        except (Gone, OSError, asyncio.TimeoutError):
            log.info("a client left, or read too slowly, before its stream was complete")
        except asyncio.CancelledError:  # the end of the server, and of its patience
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                await self._write(send, f"data: {json.dumps(cut_off().body)}\n\n".encode(), True)
                await self._write(send, b"", False)
        finally:
            self._close()
            await self._events.aclose()

    async def _write(self, send: Any, content: bytes, more: bool) -> None:
        message = {"type": "http.response.body", "body": content, "more_body": more}
        await asyncio.wait_for(send(message), self._seconds)


class Guard:
    """Around the whole application: who may ask, what is counted and logged, and that no error goes unanswered.

    Pure ASGI, so that nothing stands between a stream and its client. Logs method, route, status and time only.

    Args:
        app: the application.
        settings: key and hosts.
        metrics: where to count.
    """

    OPEN = ("/", "/docs", "/openapi.json", "/health", "/metrics", "/chat")

    def __init__(self, app: Any, settings: ServeSettings, metrics: Metrics):
        self.app, self.settings, self.metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        started, name = time.monotonic(), secrets.token_hex(8)
        status = 0
        is_complete = False

        async def counted(message: Any) -> None:
            nonlocal status, is_complete
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", name.encode())]
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                is_complete = True

        try:
            refusal = self._refusal(scope)
            app = self.app if refusal is None else error_response(refusal)
            await app(scope, receive, counted)
        except asyncio.CancelledError:
            log.info("the end came before an answer was complete")
            if not status:
                await error_response(cut_off())(scope, receive, counted)
        except Exception as error:
            log_error("a request failed", error)
            if status and not is_complete:
                raise ConnectionError("the answer was cut off") from None
            if not status:
                broken = ApiError(500, "Something went wrong on the server.", code="internal_error")
                await error_response(broken)(scope, receive, counted)
        finally:
            route = getattr(scope.get("route"), "path", None) or "other"
            self.metrics.responses.labels(route, str(status)).inc()
            if route not in self.OPEN:
                seconds = time.monotonic() - started
                log.info("%s %s %s %d %.2fs", name, scope["method"], route, status, seconds)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = dict(scope["headers"])
        trusted = self.settings.trusted_hosts
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        if trusted and name not in trusted:
            return ApiError(421, "This server does not answer under that name (Host header).", code="unknown_host")
        key = self.settings.api_key
        if key is not None and scope["path"] not in self.OPEN:
            given = headers.get(b"authorization", b"")
            if not secrets.compare_digest(given, f"Bearer {key}".encode()):
                return ApiError(
                    401,
                    "Wrong or missing API key; send it as Authorization: Bearer <key>.",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        return None
