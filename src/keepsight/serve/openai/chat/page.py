"""The page itself, and an image for who has none at hand."""

from __future__ import annotations

from importlib.resources import files

from starlette.responses import FileResponse, HTMLResponse, Response

from keepsight.shipped import IMAGE_NAME, resolve_image

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data: blob:",
    "Cache-Control": "no-store",
}


def chat_page() -> Response:
    """The page. It loads nothing from anywhere, and talks to the server alone that it comes from."""
    text = files(__package__).joinpath("chat.html").read_text(encoding="utf-8")
    return HTMLResponse(text, headers=_HEADERS)


def example_image() -> Response:
    """The digits that the built-in models read."""
    return FileResponse(resolve_image(IMAGE_NAME), media_type="image/png")
