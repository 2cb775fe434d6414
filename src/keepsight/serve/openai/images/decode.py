"""Decoding images that strangers send.

Only formats that Pillow decodes by itself (no external programs), one frame, and never more pixels than allowed: the
size is read from the header, before anything is decoded.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from keepsight.data.images import what_it_is
from keepsight.data.pixels import ImageError, as_seen
from keepsight.serve.errors import ApiError, bad, too_large
from keepsight.serve.openai.settings import Limits

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


def decode_image(content: bytes, limits: Limits, param: str, left: int | None = None) -> Any:
    """A PIL image in RGB, as a browser shows it (see `keepsight.data.pixels.as_seen`).

    Args:
        content: an image file's bytes.
        limits: size limits.
        param: where in the request it stands, for errors.
        left: pixels that the request may still have.

    Raises:
        ApiError: 413 if it is too large, 400 if it is no image, damaged, or of another format.
    """
    check_bytes(len(content), limits, param)
    if not content:
        raise bad("The image is empty (0 bytes).", param, "invalid_image")
    unreadable = f"Not an image that this server reads{what_it_is(content[:64])}. Expected is {', '.join(FORMATS)}."
    with opened(content, "image", unreadable, param) as image:
        width, height = image.size
        if width * height > limits.max_image_pixels:
            raise too_large(
                f"The image has {width} x {height} pixels; this server takes {limits.max_image_pixels:,} at most. "
                "Make it smaller; the model would shrink it anyway.",
                param,
                "image_too_large",
            )
        if left is not None and width * height > left:
            raise too_large(
                f"The images of this request have more than {2 * limits.max_image_pixels:,} pixels together.",
                param,
                "images_too_large",
            )
        return as_seen(image)


@contextmanager
def opened(content: bytes, what: Literal["image", "video"], unreadable: str, param: str) -> Iterator[Any]:
    """A PIL image; what Pillow raises while it is opened and decoded becomes the answer that the client gets.

    Args:
        content: a file's bytes.
        what: it holds.
        unreadable: what to say of a file in none of the `FORMATS`.
        param: where in the request it stands.

    Raises:
        ApiError: 400, or 413 for what claims an enormous size.
    """
    from PIL import Image, UnidentifiedImageError

    code = f"invalid_{what}"
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            yield image
    except UnidentifiedImageError:
        raise bad(unreadable, param, code) from None
    except Image.DecompressionBombError:
        raise too_large(f"The {what} claims an enormous size.", param, "image_too_large") from None
    except ApiError:
        raise
    except ImageError as error:
        raise bad(f"The {what} cannot be used: {error}", param, code) from None
    except Exception as error:  # decoders raise many kinds; what they say describes the client's own file
        raise bad(f"The {what} is damaged or cut off ({type(error).__name__}).", param, code) from None


def check_bytes(size: int, limits: Limits, param: str) -> None:
    """Refuse an encoded image that is too large.

    Raises:
        ApiError: 413.
    """
    if size > limits.max_image_bytes:
        raise too_large(
            f"The image has {size:,} bytes; this server takes {limits.max_image_bytes:,} at most.",
            param,
            "image_too_large",
        )
