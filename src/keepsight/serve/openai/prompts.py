"""Messages to model inputs: chat template, images, processor. Runs beside the engine, one request at a time."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import torch
from jinja2 import TemplateError

from keepsight.serve.errors import ApiError, bad
from keepsight.serve.openai.asked.messages import FilePart, ImagePart
from keepsight.serve.openai.asked.request import ChatRequest
from keepsight.serve.openai.images.decode import decode_image
from keepsight.serve.openai.images.sources import ImageSources
from keepsight.serve.openai.settings import Limits
from keepsight.serve.openai.template import call_for_template, write_prompt

#: More characters than this per token of the limit cannot be a prompt worth tokenizing.
_CHARACTERS_PER_TOKEN = 32

#: What templates and processors raise for messages that they do not take.
_REFUSALS = (TemplateError, ValueError, IndexError, KeyError, TypeError, StopIteration)


class Prompts:
    """Makes inputs of requests.

    Args:
        processor: the model's.
        limits: sizes.
        sources: where images come from.
        context: positions that the model can have; None if it does not say.
        reserved: texts that stand for images or memories, and that nobody may type.
    """

    def __init__(
        self, processor: Any, limits: Limits, sources: ImageSources, context: int | None, reserved: tuple[str, ...]
    ):
        self.processor, self.limits, self.sources = processor, limits, sources
        self.context, self.reserved = context, reserved
        self._lock = threading.Lock()  # tokenizers change their own settings while they encode

    def collect_images(self, request: ChatRequest) -> list[tuple[str, bytes]]:
        """The image files of a request, in order: (where it stands, its bytes).

        Raises:
            ApiError: 4xx.
        """
        places = [
            (f"messages.{m}.content.{p}", part)
            for m, message in enumerate(request.messages)
            for p, part in enumerate(message.content)
            if isinstance(part, (ImagePart, FilePart))
        ]
        if len(places) > self.limits.max_images:
            raise bad(
                f"{len(places)} images; this server takes {self.limits.max_images} per request at most.",
                "messages",
                "too_many_images",
            )
        deadline = time.monotonic() + self.limits.fetch_seconds
        files = []
        for place, part in places:
            url = part.image_url.url if isinstance(part, ImagePart) else part.file.file_id
            if isinstance(part, FilePart) and not url.startswith("file-"):
                raise ApiError(404, "No such file; upload it to /v1/files.", param=place, code="file_not_found")
            files.append((place, self.sources.read(url, place, deadline)))
        return files

    def decode_images(self, files: list[tuple[str, bytes]]) -> list[Any]:
        """PIL images.

        Raises:
            ApiError: 4xx.
        """
        images: list[Any] = []
        left = 2 * self.limits.max_image_pixels
        for place, content in files:
            images.append(decode_image(content, self.limits, place, left))
            left -= images[-1].width * images[-1].height
        return images

    def encode(self, request: ChatRequest, images: list[Any], places: list[str]) -> tuple[str, dict[str, torch.Tensor]]:
        """A request as the chat template writes it, and what the processor makes of it: one row.

        Args:
            request: checked.
            images: PIL images, in order.
            places: where each of them stands in the request.

        Raises:
            ApiError: 400 if it is too long, or the template or the processor refuses it.
        """
        messages = []
        tools = [tool.described() for tool in request.offered]
        characters = self._count(json.dumps(tools, ensure_ascii=False), "tools")
        for m, message in enumerate(request.messages):
            parts: list[dict[str, str]] = []
            for p, part in enumerate(message.content):
                if isinstance(part, (ImagePart, FilePart)):
                    parts.append({"type": "image"})
                    continue
                characters += self._count(part.text, f"messages.{m}.content.{p}")
                parts.append({"type": "text", "text": part.text})
            role = "system" if message.role == "developer" else message.role
            turn: dict[str, Any] = {"role": role, "content": parts}
            for t, call in enumerate(message.tool_calls):
                place = f"messages.{m}.tool_calls.{t}.function"
                characters += self._count(f"{call.function.name} {call.function.arguments}", place)
                turn.setdefault("tool_calls", []).append(call_for_template(call, place))
            messages.append(turn)
        if characters > self.limits.max_prompt_tokens * _CHARACTERS_PER_TOKEN:
            raise self._too_long(f"{characters:,} characters")
        with self._lock:
            try:
                text = write_prompt(self.processor, messages, tools)
                inputs = self.processor(
                    text=[text], images=[images] if images else None, add_special_tokens=False, return_tensors="pt"
                )
            except ApiError:
                raise
            except Exception as error:
                refused = self._refused_image(images, places)
                if refused is None and not isinstance(error, _REFUSALS):
                    raise
                what = str(error) if isinstance(error, (TemplateError, ValueError)) else type(error).__name__
                found = "these messages" if refused is None else f"the image at {refused}"
                raise bad(
                    f"The model's processor refuses {found}: {what[:300]}", refused or "messages", "invalid_value"
                ) from None
        if inputs["input_ids"].shape[1] > self.limits.max_prompt_tokens:
            raise self._too_long(f"{inputs['input_ids'].shape[1]:,} tokens")
        return text, {name: value for name, value in inputs.items() if torch.is_tensor(value)}

    def _count(self, text: str, place: str) -> int:
        """The length of a text that a client has typed.

        Raises:
            ApiError: 400 if it holds what stands for images or memories.
        """
        typed = next((word for word in self.reserved if word in text), None)
        if typed is not None:
            raise bad(
                f"The text holds {typed}, which stands for an image or a memory. Send images as image_url parts.",
                place,
                "reserved_token",
            )
        return len(text)

    def _refused_image(self, images: list[Any], places: list[str]) -> str | None:
        """Where the image stands that the processor refuses by itself; None: it is none of them."""
        for image, place in zip(images, places, strict=True):
            try:
                self.processor.image_processor([image], return_tensors="pt")
            except Exception:  # of whatever kind: it was raised once already, and has been caught
                return place
        return None

    def room(self, prompt: int, asked: int | None, name: str) -> int:
        """How many tokens may be written.

        Args:
            prompt: length of the prompt.
            asked: what the client asks for; None: as many as allowed.
            name: what the client calls that.

        Raises:
            ApiError: 400 if it is more than the server or the model allows.
        """
        most = self.limits.max_output_tokens
        if asked is not None and asked > most:
            raise bad(f"{name}={asked}; this server writes {most} at most.", name, "invalid_value")
        left = most if self.context is None else self.context - prompt
        if left < (asked or 1):
            more = "" if asked is None else f" and {name} is {asked:,}"
            raise bad(
                f"The prompt has {prompt:,} tokens{more}; the model's context is {self.context:,} tokens.",
                "messages" if left < 1 else name,
                "context_length_exceeded",
            )
        return asked or min(most, left)

    def _too_long(self, found: str) -> ApiError:
        return bad(
            f"The prompt has {found}; this server takes {self.limits.max_prompt_tokens:,} tokens at most.",
            "messages",
            "context_length_exceeded",
        )
