"""What a server may be told: its limits, and where images may come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MB = 1_000_000


@dataclass(frozen=True)
class Limits:
    """What one request, and all together, may use. Every excess has its own 4xx answer.

    Attributes:
        max_batch: rows (answers) that are written at the same time.
        max_queue: requests that wait; further ones get 429.
        max_prepared: requests whose images are decoded at a time, those that wait for the engine included. The others
            wait as they came.
        max_choices: largest `n`.
        max_output_tokens: largest `max_tokens`, and its default.
        max_prompt_tokens: longest prompt, visual tokens included.
        max_images: images per request.
        max_frames: frames of one video.
        max_image_bytes: size of one encoded image.
        max_image_pixels: width x height of one image, read from its header before it is decoded; all images of a
            request together may have twice as many.
        max_body_bytes: size of a request.
        max_upload_bytes: all uploaded files together; the oldest are dropped.
        upload_seconds: how long an uploaded file is kept.
        read_seconds: how long a client may take to send its request.
        write_seconds: how long a client may take to read one piece of a stream.
        fetch_seconds: how long fetching all remote images of a request may take.
    """

    max_batch: int = 8
    max_queue: int = 32
    max_prepared: int = 4
    max_choices: int = 8
    max_output_tokens: int = 2048
    max_prompt_tokens: int = 32_768
    max_images: int = 16
    max_frames: int = 128
    max_image_bytes: int = 20 * MB
    max_image_pixels: int = 50 * MB
    max_body_bytes: int = 32 * MB
    max_upload_bytes: int = 256 * MB
    upload_seconds: float = 3600.0
    read_seconds: float = 60.0
    write_seconds: float = 60.0
    fetch_seconds: float = 20.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0 and name != "max_queue":
                raise ValueError(f"{name}={value}: expected a number above 0.")


@dataclass(frozen=True)
class FarReading:
    """For a model that cannot write a long text about anything: one, to be put before a question on the page.

    Attributes:
        asked: what the long text answers.
        text: the long text.
        question: what can be asked of this model.
        regex: what its answers to that are held to.
    """

    asked: str
    text: str
    question: str
    regex: str


@dataclass(frozen=True)
class ServeSettings:
    """How a server behaves.

    Attributes:
        name: what clients call the model.
        limits: see `Limits`.
        api_key: what clients must send as a bearer token; None: nothing.
        local_folders: folders that image paths may point into; by default none.
        remote_hosts: hosts that images may be fetched from; by default none.
        trusted_hosts: `Host` headers that are answered; empty: any.
        chat: whether there is a page to try the model on, at /chat.
        far_reading: for the page, by a model's processor.
    """

    name: str
    limits: Limits = field(default_factory=Limits)
    api_key: str | None = field(default=None, repr=False)
    local_folders: tuple[Path, ...] = ()
    remote_hosts: tuple[str, ...] = ()
    trusted_hosts: tuple[str, ...] = ()
    chat: bool = False
    far_reading: Callable[[Any], FarReading | None] = lambda processor: None
