"""The routes of the page: the page itself, and where an answer looked."""

from __future__ import annotations

import asyncio
import json
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from pydantic import ValidationError
from starlette.responses import HTMLResponse, JSONResponse, Response

from keepsight.serve.errors import bad
from keepsight.serve.openai.asked.request import parse
from keepsight.serve.openai.chat.look import Look, look
from keepsight.serve.openai.http import read_body, require_json

if TYPE_CHECKING:
    from keepsight.serve.openai.api import Api

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data: blob:",
    "Cache-Control": "no-store",
}


class ChatPage:
    """`/chat` and `/chat/look` of a server.

    Args:
        api: the server's other routes.
    """

    def __init__(self, api: Api):
        self.api = api

    def add_to(self, app: FastAPI) -> None:
        """Add the routes."""
        app.get("/chat", include_in_schema=False)(self.page)
        app.post("/chat/look", include_in_schema=False)(self.look)

    async def page(self) -> Response:
        """The page. It loads nothing from anywhere, and talks to this server alone."""
        text = files(__package__).joinpath("chat.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers=_HEADERS)

    async def look(self, request: Request) -> Response:
        """Where the model and its memory looked for every word of an answer; see `look.look`."""
        api = self.api
        require_json(request)
        with api.slot():
            body = await read_body(request, api.settings.limits)
            try:
                given = Look.model_validate(json.loads(body))
            except (ValidationError, ValueError):
                raise bad(
                    "Expected {request, answer, invocations}, as /chat sends them.", code="invalid_json"
                ) from None
            asked = parse(json.dumps(given.request).encode())
            offer = api.offer(asked.model, "request.model")

            sent = await api.in_thread(offer.prompts.collect, asked)

            def prepare() -> dict[str, Any]:
                media = offer.prompts.decode(sent)
                return offer.prompts.encode(asked, media, [one.place for one in sent])[1]

            async with api.prepared:  # as every request, until its images have been read
                inputs = await api.in_thread(prepare)
                memory = offer.served.has_memory and asked.keepsight.memory is not False
                found = api.engine.aside(lambda: look(offer.served, inputs, given, memory))
                return JSONResponse(await asyncio.wrap_future(found))
