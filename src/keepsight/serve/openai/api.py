"""The routes: chat completions, models, files, health, metrics."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from keepsight.serve.errors import ApiError, bad, no_route
from keepsight.serve.hf.engine import BatchEngine
from keepsight.serve.hf.rows import Job
from keepsight.serve.hf.sampling import Sampling
from keepsight.serve.hf.served import Served
from keepsight.serve.openai import pages
from keepsight.serve.openai.answers import ChatAnswer
from keepsight.serve.openai.asked.request import ChatRequest, parse
from keepsight.serve.openai.chat.routes import add_chat_page
from keepsight.serve.openai.handover import Events, Turn
from keepsight.serve.openai.http import (
    EventStream,
    Gone,
    Guard,
    discard_body,
    error_response,
    read_body,
    require_json,
    until_gone,
)
from keepsight.serve.openai.images.decode import decode_image
from keepsight.serve.openai.images.fetch import Fetcher
from keepsight.serve.openai.images.sources import ImageSources
from keepsight.serve.openai.images.uploads import Uploads, in_form
from keepsight.serve.openai.offers import Offer
from keepsight.serve.openai.prompts import Sent
from keepsight.serve.openai.settings import ServeSettings

_UNHEALTHY_AFTER = 600.0  # seconds without a sign of the engine


class Api:
    """One model behind OpenAI's routes, or several on one base.

    Args:
        served: the model and what is known about it.
        settings: limits and permissions.
        engine: computes; made if not given.
        others: name -> further models.
    """

    def __init__(
        self,
        served: Served,
        settings: ServeSettings,
        engine: BatchEngine | None = None,
        others: Mapping[str, Served] | None = None,
    ):
        others = others or {}
        self.served, self.settings = served, settings
        limits = settings.limits
        models = {name: (other.model, other.tokenizer) for name, other in others.items()}
        self.engine = engine or BatchEngine(served.model, served.tokenizer, limits.max_batch, others=models)
        self.metrics = self.engine.metrics
        self.uploads = Uploads(limits)
        fetcher = Fetcher(settings.remote_hosts, limits) if settings.remote_hosts else None
        sources = ImageSources(limits, self.uploads, fetcher, settings.local_folders)
        self.offers = {settings.name: Offer(settings.name, "", served, limits, sources, self.engine.takes_videos)}
        self.offers |= {name: Offer(name, name, other, limits, sources) for name, other in others.items()}
        self._open = 0
        self.prepared = asyncio.Semaphore(limits.max_prepared)
        self._workers = ThreadPoolExecutor(limits.max_batch + limits.max_queue, thread_name_prefix="keepsight-worker")

    def app(self) -> Any:
        """The ASGI application."""
        app = FastAPI(title="keepsight", docs_url=None, redoc_url=None, openapi_url=None, lifespan=self._lifespan)
        app.post("/v1/chat/completions")(self.chat)
        app.get("/v1/models")(self.models)
        app.get("/v1/models/{name:path}")(self.model)
        app.post("/v1/files")(self.upload)
        app.get("/v1/files/{name}")(self.file)
        app.delete("/v1/files/{name}")(self.delete)
        app.get("/health")(self.health)
        app.head("/health", include_in_schema=False)(self.health)
        app.get("/metrics")(self.counts)
        app.get("/", include_in_schema=False)(self.index)
        app.get("/docs", include_in_schema=False)(self.reference)
        app.get("/openapi.json", include_in_schema=False)(self.schema)

        if self.settings.chat:
            add_chat_page(app, self)

        @app.exception_handler(ApiError)
        async def api_error(request: Request, error: ApiError) -> Response:
            return error_response(error)

        @app.exception_handler(HTTPException)
        async def http_error(request: Request, error: HTTPException) -> Response:
            return error_response(no_route(request.method, error))

        @app.exception_handler(Gone)
        async def client_gone(request: Request, error: Gone) -> Response:
            return Response(status_code=499)  # nobody reads it; nginx counts such requests under this number

        @app.exception_handler(Exception)
        async def unexpected(request: Request, error: Exception) -> Response:
            return error_response(ApiError(500, "Something went wrong on the server.", code="internal_error"))

        return Guard(app, self.settings, self.metrics)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Any) -> AsyncIterator[None]:
        self.engine.start()
        yield
        self.engine.cut_off()  # uvicorn has waited; what is still here has had its time
        await asyncio.to_thread(self.engine.close)
        self._workers.shutdown(wait=False, cancel_futures=True)

    @contextlib.contextmanager
    def slot(self) -> Any:
        """A place among the requests that are here, from before the body is read until the last byte is sent."""
        limits = self.settings.limits
        if self._open >= limits.max_batch + limits.max_queue:
            raise ApiError(
                429,
                f"{self._open} requests are open, which is all that this server takes. Try again in a moment.",
                code="too_many_requests",
            )
        self._open += 1
        self.metrics.open.set(self._open)
        try:
            yield
        finally:
            self._open -= 1
            self.metrics.open.set(self._open)

    # Chat

    async def chat(self, request: Request) -> Response:
        """Answer a conversation with text and images, whole or streamed."""
        require_json(request)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self.slot())
            except ApiError:
                await discard_body(request, self.settings.limits)
                raise
            body = await read_body(request, self.settings.limits)
            gone = asyncio.create_task(until_gone(request.receive))
            stack.callback(gone.cancel)
            asked = await self.in_thread(parse, body)
            del body
            offer = self.offer(asked.model, "model")
            self._check(asked, offer.served)
            files = await self.in_thread(offer.prompts.collect, asked)
            turn = Turn(self.prepared, self.metrics)
            stack.callback(turn.end)
            await turn.wait(gone)
            events = Events(asked.stream, gone)
            job = await self.in_thread(self._prepare, asked, offer, files, events, turn)
            del files
            self.engine.submit(job)
            stack.callback(self.engine.cancel, job)
            answer = ChatAnswer(asked, job, offer.name, offer.token_names, offer.reads_calls)
            if not asked.stream:
                return JSONResponse(await answer.whole(events))
            first = await events.next()  # an error before it still gets a status of its own
            stream = answer.stream(events, first)
            return EventStream(stream, self.settings.limits.write_seconds, stack.pop_all().close)

    def offer(self, name: str, param: str | None = None) -> Offer:
        """A model by its name."""
        found = self.offers.get(name)
        if found is None:
            known = ", ".join(map(repr, self.offers))
            raise ApiError(404, f"This server has {known}.", param=param, code="model_not_found")
        return found

    def _check(self, asked: ChatRequest, served: Served) -> None:
        """What can be known before any image is looked at."""
        limits = self.settings.limits
        for name in self.engine.unserved:
            if getattr(asked, name):
                raise bad(
                    f"{name} is not supported with this server's engine; leave it out.", name, "unsupported_parameter"
                )
        most = min(limits.max_choices, limits.max_batch)
        if asked.n > most:
            raise bad(f"n={asked.n}; this server writes {most} answers to a request at most.", "n", "invalid_value")
        if asked.keepsight.memory and not served.has_memory:
            raise bad("keepsight.memory: this model carries no memory.", "keepsight.memory", "no_memory")
        wrong = [token for token in asked.logit_bias if not 0 <= token < served.vocabulary]
        if wrong:
            raise bad(f"logit_bias: {wrong[0]} is no token id of this model.", "logit_bias", "invalid_value")

    def _prepare(self, asked: ChatRequest, offer: Offer, files: list[Sent], events: Events, turn: Turn) -> Job:
        """Images, text and settings as the engine takes them. In a worker thread."""
        text, media, inputs = offer.prompts.encode(asked, files)
        length = inputs["input_ids"].shape[1]
        name, most = asked.length
        self.metrics.images.inc(len(media))
        sampling = Sampling(
            max_tokens=offer.prompts.room(length, most, name),
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=None if asked.top_k is None else max(asked.top_k, 0),
            min_p=asked.min_p,
            repetition_penalty=asked.repetition_penalty,
            frequency_penalty=asked.frequency_penalty,
            presence_penalty=asked.presence_penalty,
            logit_bias=asked.logit_bias,
            seed=asked.seed,
            logprobs=asked.top_logprobs if asked.logprobs else None,
            stop=tuple(asked.stop),
        )
        memory = offer.served.has_memory and asked.keepsight.memory is not False
        source = (text, media) if self.engine.wants_source else None
        grammar = offer.grammar(asked)
        return Job(inputs, length, sampling, asked.n, memory, events.send, turn.end, offer.key, grammar, source)

    async def in_thread(self, call: Any, *args: Any) -> Any:
        """Run something in a worker thread. There is one for every request that can be open, so that a remote host that
        does not answer holds up nobody else."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, call, *args)

    # Models and files

    async def models(self) -> Any:
        """All models of this server."""
        return {"object": "list", "data": [offer.describe() for offer in self.offers.values()]}

    async def model(self, name: str) -> Any:
        """One model."""
        return self.offer(name).describe()

    async def upload(self, request: Request) -> Any:
        """Upload an image, as multipart/form-data with purpose "vision"."""
        limits = self.settings.limits
        with self.slot():
            content, name = await in_form(request.headers, await read_body(request, limits), limits)
            async with self.prepared:
                await self.in_thread(decode_image, content, limits, "file")
            return self.uploads.add(content, name).describe(limits.upload_seconds)

    async def file(self, name: str) -> Any:
        """One upload."""
        return self.uploads.get(name).describe(self.settings.limits.upload_seconds)

    async def delete(self, name: str) -> Any:
        """Forget an upload."""
        self.uploads.delete(name)
        return {"id": name, "object": "file", "deleted": True}

    # For those who watch

    async def index(self, request: Request) -> Response:
        """What is served, and how to call it."""
        known = self.settings.api_key is None  # a browser sends no key
        models = [offer.describe() for offer in self.offers.values()] if known else []
        return pages.index(models, str(request.base_url), self.settings.chat)

    async def schema(self, request: Request) -> Response:
        """The OpenAPI schema."""
        return JSONResponse(pages.openapi(request.app))

    async def reference(self, request: Request) -> Response:
        """The same, to be read."""
        return pages.reference(pages.openapi(request.app))

    async def health(self) -> Response:
        """200 while the engine moves, 503 otherwise."""
        silence = self.engine.silence()
        if silence is None or silence > _UNHEALTHY_AFTER:
            return JSONResponse({"status": "the engine does not move", "seconds": silence}, 503)
        return JSONResponse({"status": "ok"})

    async def counts(self) -> Response:
        """Counts and times, for Prometheus."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
