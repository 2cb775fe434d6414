"""Events of the engine to OpenAI's objects: a whole chat completion, or the chunks of a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any

from keepsight.serve.errors import ApiError
from keepsight.serve.hf.rows import Finished, InvocationRecord, Job, Piece
from keepsight.serve.openai.asked.request import ChatRequest
from keepsight.serve.openai.asked.tools import CallReader
from keepsight.serve.openai.handover import Events
from keepsight.serve.openai.names import TokenNames


class ChatAnswer:
    """The answer to one request.

    Args:
        asked: the request.
        job: the same, as the engine has it.
        model: what the model is called.
        names: of tokens.
        reads_calls: whether calls of tools are found in the text.
    """

    def __init__(self, asked: ChatRequest, job: Job, model: str, names: TokenNames, reads_calls: bool = False):
        self._asked, self._job, self._names = asked, job, names
        tools = asked.offered if reads_calls else []
        self._readers = [CallReader(tools) if tools else None for _ in range(asked.n)]
        name = f"chatcmpl-{secrets.token_hex(12)}"
        self._head = {"id": name, "created": int(time.time()), "model": model, "system_fingerprint": None}

    async def whole(self, events: Events) -> dict[str, Any]:
        """A `chat.completion`, when all its choices are complete.

        Raises:
            ApiError: if the request fails.
            Gone: if the client leaves.
        """
        count = self._asked.n
        texts = [""] * count
        entries: list[list[Any]] = [[] for _ in range(count)]
        finished: dict[int, Finished] = {}
        while len(finished) < count:
            event = await events.next()
            if isinstance(event, Piece):
                texts[event.index] += self._said(event)
                entries[event.index] += event.logprobs
            else:
                finished[event.index] = event
        choices = []
        for i in range(count):
            rest, calls, reason = self._end(finished[i])
            message: dict[str, Any] = {"role": "assistant", "content": texts[i] + rest, "refusal": None}
            if calls:
                message |= {"content": message["content"] or None, "tool_calls": calls}
            choices.append(
                {
                    "index": i,
                    "message": message,
                    "logprobs": self._logprobs(entries[i]),
                    "finish_reason": reason,
                    "keepsight": self._memory(finished[i]),
                }
            )
        used = self._usage(list(finished.values()))
        return self._head | {"object": "chat.completion", "choices": choices, "usage": used}

    async def stream(self, events: Events, event: Piece | Finished) -> AsyncGenerator[dict[str, Any], None]:
        """`chat.completion.chunk`s; an error's body where the request fails half-way.

        Args:
            events: what comes.
            event: the first that came.

        Raises:
            Gone: if the client leaves.
        """
        finished: list[Finished] = []
        for i in range(self._asked.n):
            yield self._chunk(i, {"role": "assistant", "content": "", "refusal": None})
        try:
            while True:
                if isinstance(event, Piece):
                    said = {"content": self._said(event)}
                    if said["content"] or event.logprobs:
                        yield self._chunk(event.index, said, logprobs=self._logprobs(event.logprobs))
                else:
                    finished.append(event)
                    rest, calls, reason = self._end(event)
                    if rest:
                        yield self._chunk(event.index, {"content": rest})
                    if calls:
                        told = [{"index": c} | call for c, call in enumerate(calls)]
                        yield self._chunk(event.index, {"tool_calls": told})
                    yield self._chunk(event.index, {}, finish_reason=reason, keepsight=self._memory(event))
                if len(finished) == self._asked.n:
                    break
                event = await events.next()
        except ApiError as error:
            yield error.body
            return
        if self._asked.include_usage:
            yield self._head | {"object": "chat.completion.chunk", "choices": [], "usage": self._usage(finished)}

    def _said(self, piece: Piece) -> str:
        """What of a piece of text goes out now."""
        reader = self._readers[piece.index]
        return piece.text if reader is None else reader.push(piece.text)

    def _end(self, finished: Finished) -> tuple[str, list[dict[str, Any]], str]:
        """(the rest of the text, calls of tools, why the answer ended)."""
        reader = self._readers[finished.index]
        rest, calls = ("", []) if reader is None else reader.finish()
        return rest, calls, "tool_calls" if calls and finished.reason == "stop" else finished.reason

    def _chunk(self, index: int, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None} | more
        usage = {"usage": None} if self._asked.include_usage else {}
        return self._head | {"object": "chat.completion.chunk", "choices": [choice]} | usage

    def _usage(self, finished: list[Finished]) -> dict[str, Any]:
        """Positions read and written. Memories count, as they do towards `max_tokens`."""
        read, written = self._job.prompt_tokens, sum(f.tokens for f in finished)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def _memory(self, finished: Finished) -> dict[str, Any]:
        """The extension field of one choice."""
        return {
            "memory": self._job.memory,
            "memory_tokens": finished.memory_tokens,
            "invocations": [_invocation(i) for i in finished.invocations],
        }

    def _logprobs(self, entries: list[Any]) -> dict[str, Any] | None:
        """OpenAI's list of token log-probabilities, of (id, log-probability, [(id, log-probability) of the
        likeliest])."""
        if not self._asked.logprobs:
            return None
        content = [
            self._token(token, value) | {"top_logprobs": [self._token(*pair) for pair in top]}
            for token, value, top in entries
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, value: float) -> dict[str, Any]:
        # JSON knows no infinity; OpenAI writes -9999.
        return {
            "token": self._names.text(token),
            "logprob": max(value, -9999.0),
            "bytes": list(self._names.bytes(token)),
        }


def _invocation(invocation: InvocationRecord) -> dict[str, Any]:
    return {
        "kind": invocation.kind,
        "invoked_as": invocation.invoked_as,
        "text_offset": invocation.text_offset,
        "latents": invocation.latents,
        "chosen_by_model": invocation.was_sampled,
    }
