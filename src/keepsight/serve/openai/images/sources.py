"""Where a request's images come from: data URLs, uploads; paths and remote hosts only where the server allows it."""

from __future__ import annotations

import base64
import binascii
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from keepsight.data.images import is_base64
from keepsight.serve.errors import ApiError, bad
from keepsight.serve.openai.images.decode import check_bytes
from keepsight.serve.openai.images.fetch import Fetcher
from keepsight.serve.openai.images.uploads import Uploads
from keepsight.serve.openai.settings import Limits


class ImageSources:
    """Reads the bytes that an image URL stands for.

    Args:
        limits: size and time.
        uploads: uploaded files.
        fetcher: fetches remote images; None: none are fetched.
        folders: folders that local paths may point into.
    """

    def __init__(self, limits: Limits, uploads: Uploads, fetcher: Fetcher | None = None, folders: Sequence[Path] = ()):
        self.limits, self.uploads, self.fetcher = limits, uploads, fetcher
        self.folders = tuple(Path(folder).resolve() for folder in folders)

    def read(self, url: str, param: str, deadline: float | None = None) -> bytes:
        """The bytes of an image file.

        Args:
            url: data:..., file-<id of an upload>, a path or file:// URL, or http(s)://....
            param: where in the request it stands, for errors.
            deadline: when to give up fetching, on the monotonic clock.

        Raises:
            ApiError: 4xx, if it is not allowed, not there, or too large.
        """
        scheme = url[:8].partition(":")[0].lower()
        if scheme == "data":
            return self._data(url, param)
        if url.startswith("file-"):
            return self.uploads.get(url, param).content
        if scheme in ("http", "https"):
            if self.fetcher is None:
                raise bad(
                    "This server fetches no remote images or videos. Send the file itself, as a data URL "
                    "(data:image/png;base64,...), or upload it to /v1/files.",
                    param,
                    "remote_image_not_allowed",
                )
            return self.fetcher.fetch(url, param, deadline)
        if is_base64(url):
            raise bad(
                "This is base64 and does not say so. Write data:image/png;base64, before it.",
                param,
                "invalid_image_url",
            )
        return self._local(url, param)

    def read_video(self, url: str, param: str, deadline: float | None = None) -> list[bytes]:
        """The image files that make a video: one for each frame of data:video/jpeg;base64,FRAME,FRAME,... (as vLLM
        takes it), or one that holds all.

        Args:
            url: as for `read`.
            param: where in the request it stands, for errors.
            deadline: as for `read`.

        Raises:
            ApiError: as `read`.
        """
        if not url[:11].lower().startswith("data:video/"):
            return [self.read(url, param, deadline)]
        head, _, body = url.partition(",")
        if head[11:].partition(";")[0].strip().lower() not in ("jpeg", "png", "webp"):
            raise bad(
                "No film is decoded here. Send frames, as data:video/jpeg;base64,FRAME,FRAME,... (each a JPEG, PNG or "
                "WebP file), or an animated GIF, WebP or PNG as data:image/gif;base64,....",
                param,
                "invalid_video",
            )
        return [self._data(f"data:image/x;base64,{frame}", param) for frame in body.split(",")]

    def _data(self, url: str, param: str) -> bytes:
        head, comma, body = url.partition(",")
        kind = head[5:].partition(";")[0].strip().lower()
        if not comma or (kind and not kind.startswith("image/")):
            raise bad("Expected data:image/<format>;base64,<the file>.", param, "invalid_image_url")
        if not head.lower().rstrip().endswith(";base64"):
            check_bytes(len(body) // 3, self.limits, param)
            return unquote_to_bytes(body)
        if "%" in body:
            body = unquote(body)
        # As lenient as browsers: white space between, and no padding at the end.
        plain = "".join(body.split()).rstrip("=")
        check_bytes(len(plain) * 3 // 4, self.limits, param)
        try:
            return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
        except (binascii.Error, ValueError):
            raise bad("The data URL is not valid base64.", param, "invalid_image_url") from None

    def _local(self, url: str, param: str) -> bytes:
        # One message for everything: a client must not learn which files there are.
        refused = bad(
            "This server reads no such path. Send the image itself, as a data URL (data:image/png;base64,...), or "
            "upload it to /v1/files.",
            param,
            "local_image_not_allowed",
        )
        name = unquote(urlsplit(url).path) if url.lower().startswith("file://") else url
        if not self.folders or not name.startswith("/") or "\0" in name:
            raise refused
        try:
            path = Path(name).resolve(strict=True)
            if not any(path.is_relative_to(folder) for folder in self.folders):
                raise refused
            # No waiting for pipes and devices, and no link put there since `resolve`.
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with open(handle, "rb") as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise refused
                check_bytes(status.st_size, self.limits, param)
                content = file.read(self.limits.max_image_bytes + 1)
                check_bytes(len(content), self.limits, param)
                return content
        except ApiError:
            raise
        except (OSError, ValueError, RuntimeError):  # RuntimeError: a loop of links
            raise refused from None
