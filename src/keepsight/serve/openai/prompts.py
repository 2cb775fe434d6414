"""Messages to model inputs: chat template, images, processor. Runs beside the engine, one request at a time."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError

from keepsight.serve.errors import ApiError, bad
from keepsight.serve.hf.served import Served
from keepsight.serve.openai.asked.messages import LOW, FilePart, ImagePart, TextPart, VideoPart, VideoUrl
from keepsight.serve.openai.asked.request import ChatRequest
from keepsight.serve.openai.images.decode import decode_image
from keepsight.serve.openai.images.sources import ImageSources
from keepsight.serve.openai.images.videos import Clip, decode_video
from keepsight.serve.openai.settings import Limits
from keepsight.serve.openai.template import call_for_template, write_prompt

#: More characters than this per token of the limit cannot be a prompt worth tokenizing.
_CHARACTERS_PER_TOKEN = 32

#: What templates and processors raise for messages that they do not take.
_REFUSALS = (TemplateError, ValueError, IndexError, KeyError, TypeError, StopIteration)


@dataclass
class Sent:
    """An image or a video as it came.

    Attributes:
        place: where it stands in the request.
        files: an image's file; of a video, those of its frames, or one that holds all.
        video: the part, if it is a video.
        low: an image that is to be read in low detail.
    """

    place: str
    files: list[bytes]
    video: VideoUrl | None = None
    low: bool = False


class Prompts:
    """Makes inputs of requests.

    Args:
        served: the model.
        limits: sizes.
        sources: where images come from.
        takes_videos: whether the engine does.
    """

    def __init__(self, served: Served, limits: Limits, sources: ImageSources, takes_videos: bool = True):
        self.served, self.processor = served, served.processor
        self.limits, self.sources = limits, sources
        self.takes_videos = takes_videos and all(
            getattr(self.processor, name, None) for name in ("video_processor", "video_token")
        )
        self._lock = threading.Lock()  # tokenizers change their own settings while they encode

    def collect(self, request: ChatRequest) -> list[Sent]:
        """The images and videos of a request, in order, not decoded.

        Raises:
            ApiError: 4xx.
        """
        places = [
            (f"messages.{m}.content.{p}", part)
            for m, message in enumerate(request.messages)
            for p, part in enumerate(message.content)
            if not isinstance(part, TextPart)
        ]
        if len(places) > self.limits.max_images:
            raise bad(
                f"{len(places)} images; this server takes {self.limits.max_images} per request at most.",
                "messages",
                "too_many_images",
            )
        deadline = time.monotonic() + self.limits.fetch_seconds
        found = []
        for place, part in places:
            if isinstance(part, VideoPart):
                if not self.takes_videos:
                    raise bad("This model reads no videos; send frames as image_url parts.", place, "no_video")
                found.append(Sent(place, self.sources.read_video(part.video_url.url, place, deadline), part.video_url))
                continue
            url = part.image_url.url if isinstance(part, ImagePart) else part.file.file_id
            if isinstance(part, FilePart) and not url.startswith("file-"):
                raise ApiError(404, "No such file; upload it to /v1/files.", param=place, code="file_not_found")
            low = isinstance(part, ImagePart) and part.image_url.detail == "low"
            found.append(Sent(place, [self.sources.read(url, place, deadline)], low=low))
        return found

    def decode(self, sent: list[Sent]) -> list[Any]:
        """PIL images, and `Clip`s of videos.

        Raises:
            ApiError: 4xx.
        """
        media: list[Any] = []
        left = 2 * self.limits.max_image_pixels
        for one in sent:
            if one.video is None:
                media.append(decode_image(one.files[0], self.limits, one.place, left))
                left -= media[-1].width * media[-1].height
                if one.low:
                    media[-1].thumbnail((LOW, LOW))  # in place, never larger
            else:
                media.append(decode_video(one.files, self.limits, one.place, left, one.video.fps))
                left -= media[-1].pixels
        return media

    def encode(self, request: ChatRequest, sent: list[Sent]) -> tuple[str, list[Any], dict[str, torch.Tensor]]:
        """A request as the chat template writes it, its images and videos decoded, and what the processor makes of it:
        one row.

        Args:
            request: checked.
            sent: what `collect` found.

        Raises:
            ApiError: 4xx if it is too long or large, or the template or the processor refuses it.
        """
        media, messages = self.decode(sent), []
        tools = [tool.described() for tool in request.offered]
        characters = self._count(json.dumps(tools, ensure_ascii=False), "tools")
        for m, message in enumerate(request.messages):
            parts: list[dict[str, str]] = []
            for p, part in enumerate(message.content):
                if not isinstance(part, TextPart):
                    parts.append({"type": "video" if isinstance(part, VideoPart) else "image"})
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
                inputs = self._process(text, media)
            except ApiError:
                raise
            except Exception as error:
                refused = self._refused(media, sent)
                if refused is None and not isinstance(error, _REFUSALS):
                    raise
                what = str(error) if isinstance(error, (TemplateError, ValueError)) else type(error).__name__
                found = "these messages" if refused is None else f"what stands at {refused}"
                raise bad(
                    f"The model's processor refuses {found}: {what[:300]}", refused or "messages", "invalid_value"
                ) from None
        if inputs["input_ids"].shape[1] > self.limits.max_prompt_tokens:
            raise self._too_long(f"{inputs['input_ids'].shape[1]:,} tokens")
        return text, media, {name: value for name, value in inputs.items() if torch.is_tensor(value)}

    def _count(self, text: str, place: str) -> int:
        """The length of a text that a client has typed.

        Raises:
            ApiError: 400 if it holds what stands for images or memories.
        """
        typed = next((word for word in self.served.reserved if word in text), None)
        if typed is not None:
            raise bad(
                f"The text holds {typed}, which stands for an image or a memory. Send images as image_url parts.",
                place,
                "reserved_token",
            )
        return len(text)

    def _process(self, text: str, media: list[Any]) -> Any:
        images = [one for one in media if not isinstance(one, Clip)]
        clips = [one.arguments() for one in media if isinstance(one, Clip)]
        more: dict[str, Any] = {}
        if clips:
            told = [metadata for _, metadata in clips]
            more = {"videos": [frames for frames, _ in clips], "video_metadata": told, "do_sample_frames": False}
        given = [images] if images else None
        return self.processor(text=[text], images=given, add_special_tokens=False, return_tensors="pt", **more)

    def _refused(self, media: list[Any], sent: list[Sent]) -> str | None:
        """Where the image or video stands that the processor refuses by itself; None: it is none of them."""
        for one, from_ in zip(media, sent, strict=True):
            try:
                if isinstance(one, Clip):
                    frames, told = one.arguments()
                    self.processor.video_processor(
                        [frames], video_metadata=[told], do_sample_frames=False, return_tensors="pt"
                    )
                else:
                    self.processor.image_processor([one], return_tensors="pt")
            except Exception:  # of whatever kind: it was raised once already, and has been caught
                return from_.place
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
        context = self.served.context
        left = most if context is None else context - prompt
        if left < (asked or 1):
            more = "" if asked is None else f" and {name} is {asked:,}"
            raise bad(
                f"The prompt has {prompt:,} tokens{more}; the model's context is {context:,} tokens.",
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
