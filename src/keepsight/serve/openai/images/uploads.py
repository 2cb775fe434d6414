"""Uploaded images: kept in memory, for a while, up to a limit; never on disk."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException, MultiPartParser

from keepsight.serve.errors import ApiError, bad
from keepsight.serve.openai.settings import Limits


@dataclass(frozen=True)
class Upload:
    """One file.

    Attributes:
        id: what a request names it by; not to be guessed.
        content: its bytes.
        name: as the client called it.
        created: seconds since 1970.
    """

    id: str
    content: bytes
    name: str
    created: float

    def describe(self, seconds: float) -> dict[str, Any]:
        """OpenAI's file object."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": len(self.content),
            "created_at": int(self.created),
            "expires_at": int(self.created + seconds),
            "filename": self.name,
            "purpose": "vision",
            "status": "processed",
        }


class Uploads:
    """The files of one server. The oldest go when there is no more room.

    Args:
        limits: room and time.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self._files: dict[str, Upload] = {}
        self._lock = threading.Lock()

    def add(self, content: bytes, name: str) -> Upload:
        """Keep a file that has been checked."""
        upload = Upload(f"file-{secrets.token_hex(16)}", content, name, time.time())
        with self._lock:
            self._forget_old()
            self._files[upload.id] = upload
            while sum(len(f.content) for f in self._files.values()) > self.limits.max_upload_bytes:
                self._files.pop(next(iter(self._files)))
        return upload

    def get(self, name: str, param: str | None = None) -> Upload:
        """A file by its id.

        Raises:
            ApiError: 404 if there is none (any more).
        """
        with self._lock:
            self._forget_old()
            found = self._files.get(name)
        if found is None:
            raise ApiError(404, "No such file; uploads expire. Upload it again.", param=param, code="file_not_found")
        return found

    def delete(self, name: str) -> None:
        """Forget a file.

        Raises:
            ApiError: 404 if there is none.
        """
        self.get(name)
        with self._lock:
            self._files.pop(name, None)

    def _forget_old(self) -> None:
        oldest = time.time() - self.limits.upload_seconds
        for name in [name for name, file in self._files.items() if file.created < oldest]:
            del self._files[name]


async def in_form(headers: Headers, body: bytes, limits: Limits) -> tuple[bytes, str]:
    """(bytes, name) of the file in the body of an upload.

    Raises:
        ApiError: 400 if it is no such form.
    """

    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    parser = MultiPartParser(headers, stream(), max_files=1, max_fields=8)
    parser.spool_max_size = limits.max_body_bytes + 1  # in memory, never on disk
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError):
        raise bad("Send multipart/form-data with a file and purpose=vision.", code="invalid_form") from None
    try:
        if form.get("purpose") != "vision":
            raise bad("purpose: expected 'vision'; this server keeps images only.", "purpose", "invalid_value")
        file: Any = form.get("file")
        if file is None or isinstance(file, str):
            raise bad("There is no file in the form.", "file", "missing_file")
        return await file.read(), str(file.filename or "image")[:256]
    finally:
        await form.close()
