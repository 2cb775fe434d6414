"""The routes of the page: the page itself, and where an answer looked."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from pydantic import ValidationError
from starlette.responses import JSONResponse, Response

from keepsight.serve.errors import bad
from keepsight.serve.openai.asked.request import parse
from keepsight.serve.openai.chat.look import Look, look
from keepsight.serve.openai.chat.page import chat_page, example_image
from keepsight.serve.openai.http import read_body, require_json

if TYPE_CHECKING:
    from keepsight.serve.openai.api import Api


def add_chat_page(app: FastAPI, api: Api) -> None:
    """Add `/chat` and what it needs to a server, whose other routes are `api`."""

    app.get("/chat", include_in_schema=False)(chat_page)
    app.get("/chat/example.png", include_in_schema=False)(example_image)

    @app.get("/chat/far", include_in_schema=False)
    async def far(model: str) -> Response:
        """A long text for a model that cannot write one, and what to ask behind it; null for all others."""
        found = api.settings.far_reading(api.offer(model, "model").served.processor)
        return JSONResponse(None if found is None else asdict(found))

    @app.post("/chat/look", include_in_schema=False)
    async def look_at(request: Request) -> Response:
        """Where the model and its memory looked for every word of an answer; see `look.look`."""
        require_json(request)
        with api.slot():
            body = await read_body(request, api.settings.limits)
            try:
                given = Look.model_validate_json(body)
            except ValidationError:
                raise bad(
                    "Expected {request, answer, invocations}, as /chat sends them.", code="invalid_json"
                ) from None
            asked = parse(json.dumps(given.request).encode())
            offer = api.offer(asked.model, "request.model")
            sent = await api.in_thread(offer.prompts.collect, asked)
            async with api.prepared:  # as every request, until its images have been read
                _, _, inputs = await api.in_thread(offer.prompts.encode, asked, sent)
                memory = offer.served.has_memory and asked.keepsight.memory is not False
                found = api.engine.aside(lambda: look(offer.served, inputs, given, memory))
                return JSONResponse(await asyncio.wrap_future(found))
