"""Opening image files so that a bad one gives one clear message, before any model is loaded."""

from __future__ import annotations

import base64
import binascii
import io
import re
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from keepsight.data.pixels import ImageError, as_seen, from_array
from keepsight.installed import MissingExtraError
from keepsight.shipped import resolve_image

__all__ = [
    "PICTURES",
    "ImageError",
    "MissingImageError",
    "find_image",
    "holds_pictures",
    "is_address",
    "is_array",
    "is_base64",
    "is_of_pictures",
    "is_picture_name",
    "open_image",
    "what_it_is",
]

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class MissingImageError(ImageError):
    """There is no file of that name."""


def open_image(source: Any) -> Any:
    """Read an image completely.

    Args:
        source: a path; bytes of an image file, also in base64, with `data:image/png;base64,` before them or without; a
            PIL image; an array of uint8, as `pixels.from_array` takes it; or {"path": ..., "bytes": ...} as `datasets`
            stores them.

    Returns:
        A PIL image in RGB, as a browser shows it (see `pixels.as_seen`).

    Raises:
        ImageError: for a missing file, something that is no image, a truncated or damaged one, several frames, and
            one whose size is that of a decompression bomb.
    """
    Image, _ = _pillow()
    if isinstance(source, Image.Image):
        with _as_lessons("this PIL image"):  # its file may be read only now
            return as_seen(source)
    if is_array(source):
        with _as_lessons("this array"):
            return as_seen(from_array(source))
    if isinstance(source, dict) and {"bytes", "path"} & set(source):
        source = source.get("bytes") or source.get("path") or b""
    if is_base64(source):
        source = _decoded(source)
    if isinstance(source, (bytes, bytearray, memoryview, str)) and not len(source):
        raise ImageError("an image without bytes and without a file's name. Where there is none, leave its cell empty.")
    if isinstance(source, (bytes, bytearray, memoryview)):
        name, content = f"these {len(source)} bytes", io.BytesIO(source)
    elif isinstance(source, (str, Path)):
        path = find_image(resolve_image(source))
        name, content = str(path), path  # type: ignore[assignment]
    else:
        raise ImageError(
            f"{type(source).__name__} is not something an image can be read from; expected a path, the bytes of an "
            "image file, a PIL image, or an array of uint8 [height, width, 3]."
        )
    with _as_lessons(name, content), warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(content) as image:
            return as_seen(image)


@contextmanager
def _as_lessons(name: str, content: Any = None) -> Iterator[None]:
    """Whatever goes wrong while an image is read becomes an `ImageError` that names it."""
    Image, UnidentifiedImageError = _pillow()
    try:
        yield
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from None
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: not an image that Pillow can read{what_it_is(_head(content))}.") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageError(
            f"{name}: too large to open safely; it claims more than {Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels. "
            "Make it smaller; a model would shrink it anyway."
        ) from error
    except Exception as error:  # Pillow's decoders raise many kinds for damaged files
        what = str(error) or type(error).__name__
        raise ImageError(f"{name}: the image is damaged or cut off ({what}). Copy or export it again.") from error


def is_array(source: Any) -> bool:
    """Whether it is an array of numpy or torch."""
    return hasattr(source, "__array__") and hasattr(source, "ndim")


def is_base64(source: Any) -> bool:
    """Whether this is an image as text: a data address, or how PNG, JPEG, GIF and WebP begin in base64."""
    begins = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")
    return isinstance(source, str) and (source.startswith("data:") or (len(source) > 64 and source.startswith(begins)))


def holds_pictures(cell: Any, or_names: bool = False) -> bool:
    """Whether a cell holds a picture, or a list of some: bytes, base64, a PIL image, or as `datasets` stores them.

    Args:
        cell: of a row.
        or_names: whether the name of a picture's file counts.
    """
    if isinstance(cell, (list, tuple)):
        return bool(cell) and all(holds_pictures(one, or_names) for one in cell)
    if isinstance(cell, str):
        return is_base64(cell) or (or_names and is_picture_name(cell))
    if isinstance(cell, dict):
        return isinstance(cell.get("bytes"), bytes) or (or_names and bool(cell.get("path")))
    return isinstance(cell, bytes) or hasattr(cell, "getexif") or is_array(cell)


def is_picture_name(text: str) -> bool:
    """Whether it ends as names of pictures do."""
    return len(text) < 1024 and text.lower().endswith(PICTURES)


def is_address(text: str) -> bool:
    """Whether it is a web address."""
    return re.match(r"https?://", text, re.IGNORECASE) is not None


def is_of_pictures(column: str) -> bool:
    """Whether a column is called as columns of pictures are."""
    return re.search(r"image|img|picture|photo", column, re.IGNORECASE) is not None


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.rpartition("base64,")[2].split()), validate=True)
    except binascii.Error as error:
        raise ImageError(f"the text {text[:32]}... is not an image in base64 ({error}).") from error


def find_image(source: str | Path, *folders: Path | None) -> Path:
    """The existing, readable file that `source` names; relative to the first of the folders that has it.

    Raises:
        ImageError: if there is none.
    """
    text = str(source)
    if re.match(r"(?!file:)[a-z][a-z0-9+]+://", text):
        raise ImageError(f"{source} is a web address. Download the image first and give the file.")
    path = Path(unquote(text[7:]) if text.startswith("file://") else text).expanduser()
    places = [folder / path for folder in folders if folder is not None] or [path]  # an absolute path stays as it is
    path = next((as_is for place in places for as_is in _spellings(place) if _is_there(as_is)), places[0])
    if not _is_there(path):
        shown = str(path) if len(str(path)) < 300 else f"{str(path)[:64]}..."
        raise MissingImageError(f"{shown}: no such image file.{_near(path, folders)}")
    if path.is_dir():
        raise ImageError(f"{path} is a folder; give the image file itself.")
    if path.stat().st_size == 0:
        raise ImageError(f"{path}: the file is empty (0 bytes).")
    try:
        with path.open("rb"):
            pass
    except PermissionError as error:
        raise ImageError(f"{path}: no permission to read this file.") from error
    return path


def _spellings(path: Path) -> Iterator[Path]:
    """The path, and how other systems write the same: Windows with backslashes, macOS with accents apart."""
    yield path
    for text in (str(path), str(path).replace("\\", "/")):
        yield from (Path(unicodedata.normalize(form, text)) for form in ("NFC", "NFD"))


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that no file can have
        return False


def _near(path: Path, folders: tuple[Path | None, ...]) -> str:
    """Where the picture seems to be, if a folder was left out or named twice, or its name is written otherwise."""
    meant = _plain(path.name)
    same = next((name for name in _names_in(path.parent) if _plain(name) == meant), None)
    if same is not None:
        return f" There is {path.parent / same}: write its name as it is."
    for folder in folders:
        if folder is not None:
            beside = [folder / path.name, *(folder / name / path.name for name in ("images", "image", "data", "imgs"))]
            found = next((place for place in beside if _is_there(place)), None)
            if found is not None:
                return f" There is {found}: say where pictures are by --image-folder, or write that path."
    return ""


@lru_cache(maxsize=16)
def _names_in(folder: Path) -> tuple[str, ...]:
    try:
        return tuple(sorted(one.name for one in folder.iterdir()))
    except (OSError, ValueError):
        return ()


def _plain(name: str) -> str:
    return unquote(unicodedata.normalize("NFC", name)).strip().casefold()


def what_it_is(head: bytes) -> str:
    """What a file that is not taken for an image seems to be, and what to do with it; nothing if nobody knows.

    Args:
        head: how it begins, 64 bytes or more.
    """
    text, brand = head.lstrip().lower(), head[8:12] if head[4:8] == b"ftyp" else None
    if head.startswith(b"version https://git-lfs"):
        return "; it is a Git LFS pointer, so fetch the real file with `git lfs pull`"
    if head.startswith(b"%PDF"):
        return "; it is a PDF, so convert its page to PNG first"
    if text.startswith((b"<!doctype html", b"<html")):
        return "; it is a web page"
    if text.startswith((b"<svg", b"<?xml")):
        return "; it is a drawing (SVG), so export it as PNG first"
    if brand in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
        return "; it is HEIC, a phone's format, so save it as JPEG first"
    if brand in (b"avif", b"avis"):
        return "; it is AVIF, so save it as PNG first"
    if brand is not None:
        return "; it is a video, so give the frame you mean"
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "; it is a TIFF, so save it as PNG first"
    return ""


def _head(content: Any) -> bytes:
    if isinstance(content, io.BytesIO):
        return content.getvalue()[:64]
    with Path(content).open("rb") as file:
        return file.read(64)


def _pillow() -> Any:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingExtraError("Reading images needs Pillow.", "train") from error
    return Image, UnidentifiedImageError
