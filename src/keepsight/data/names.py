"""Names in data: a few of them for a message, and those of pictures."""

from __future__ import annotations

import re
from typing import Any

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def some(names: Any, limit: int = 4) -> str:
    """A few of the names."""
    found = [str(name) for name in names]
    return ", ".join(found[:limit]) + (", ..." if len(found) > limit else "")


def is_picture_name(text: str) -> bool:
    """Whether it ends as names of pictures do."""
    return len(text) < 1024 and text.lower().endswith(PICTURES)


def is_address(text: str) -> bool:
    """Whether it is a web address."""
    return re.match(r"https?://", text, re.IGNORECASE) is not None


def is_of_pictures(column: str) -> bool:
    """Whether a column is called as columns of pictures are."""
    return re.search(r"image|img|picture|photo", column, re.IGNORECASE) is not None
