"""The page for a server that runs somewhere else: the page stands here, and what it asks is handed on to there."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI, Request
from starlette.concurrency import run_in_threadpool
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse

from keepsight.errors import KeepsightError
from keepsight.serve.errors import ApiError
from keepsight.serve.openai.chat.page import chat_page, example_image
from keepsight.serve.openai.http import Gone, error_response, read_body, require_json
from keepsight.serve.openai.settings import Limits

_SECONDS = 600.0  # without a word from there
_PIECE = 65_536


class _Stay(urllib.request.HTTPRedirectHandler):
    """The key is for one server: nothing follows it to another."""

    def redirect_request(self, *_: Any) -> None:
        """None: a redirection is an error."""


class Remote:
    """A server of OpenAI's API.

    Args:
        address: as people write it, with or without /v1 or /chat at its end.
        key: that it wants.
    """

    def __init__(self, address: str, key: str | None = None):
        self.address = re.sub(r"/+(v1|chat)?/*$", "", address.partition("#")[0])
        self._key = key
        self._opener = urllib.request.build_opener(_Stay)

    def open(self, path: str, body: bytes | None = None, seconds: float = _SECONDS) -> Any:
        """Its answer, to be read.

        Raises:
            urllib.error.HTTPError: its answer, if it is an error.
            OSError: if there is none.
        """
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        return self._opener.open(urllib.request.Request(self.address + path, body, headers), timeout=seconds)

    def check(self) -> list[str]:
        """The names of its models.

        Raises:
            KeepsightError: if it cannot be used, with what to do.
        """
        try:
            with self.open("/v1/models", seconds=20) as reply:
                return [str(one["id"]) for one in json.load(reply)["data"]]
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                raise KeepsightError(f"{self.address} wants a key: KEEPSIGHT_API_KEY=... keepsight chat ...") from None
            found = f"/v1/models is answered with {error.code}"
        except (KeyError, TypeError, ValueError):
            found = "/v1/models holds no list of models"
        except OSError as error:
            raise KeepsightError(
                f"{self.address} does not answer ({getattr(error, 'reason', error)}). Is it running? keepsight serve "
                "MODEL starts one."
            ) from None
        raise KeepsightError(f"{self.address} is no server of OpenAI's API: {found}. keepsight serve MODEL starts one.")


def remote_page(remote: Remote) -> Any:
    """The ASGI application: the page, for this machine alone, and the routes that it asks."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1"])

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(Gone)
    async def client_gone(request: Request, error: Gone) -> Response:
        return Response(status_code=499)

    @app.get("/")
    async def index() -> Response:
        return RedirectResponse("/chat")

    app.get("/chat")(chat_page)
    app.get("/chat/example.png")(example_image)

    @app.get("/v1/models")
    def models() -> Response:
        return _handed_on(remote, "/v1/models")

    @app.get("/chat/far")
    def far(request: Request) -> Response:
        return _handed_on(remote, f"/chat/far?{request.url.query}")

    @app.post("/chat/look")
    @app.post("/v1/chat/completions")
    async def ask(request: Request) -> Response:
        require_json(request)
        body = await read_body(request, Limits())
        return await run_in_threadpool(_handed_on, remote, request.url.path, body)

    return app


def _handed_on(remote: Remote, path: str, body: bytes | None = None) -> Response:
    try:
        reply = remote.open(path, body)
    except urllib.error.HTTPError as error:
        if path == "/chat/look" and error.code in (404, 405):
            told = "that server does not tell. keepsight serve MODEL --chat does."
            return error_response(ApiError(404, told, code="not_found"))
        with error:
            return Response(error.read(), error.code, media_type=error.headers.get_content_type())
    except OSError as error:
        return JSONResponse({"error": {"message": f"{remote.address} does not answer ({error})."}}, 502)

    def pieces() -> Iterator[bytes]:
        with reply:
            while piece := reply.read1(_PIECE):
                yield piece

    return StreamingResponse(pieces(), reply.status, media_type=reply.headers.get_content_type())
