"""What people see who open the server's address in a browser, and the schema of its routes.

The pages load nothing from anywhere: the server may have no way to the internet, and its visitors' addresses are
nobody's business.
"""

from __future__ import annotations

import functools
from typing import Any

import jinja2
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.responses import HTMLResponse

from keepsight import __version__
from keepsight.serve.openai.asked.request import ChatRequest

_SCHEMAS = "#/components/schemas/"
_ERROR_AS = {"$ref": f"{_SCHEMAS}Error"}
_WORD = {"anyOf": [{"type": "string"}, {"type": "null"}]}
_ERROR = {
    "title": "Error",
    "description": "Why a request is refused or failed. param is the parameter at fault, as the client wrote it.",
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {"message": {"type": "string"}, "type": {"type": "string"}, "param": _WORD, "code": _WORD},
        }
    },
}
_HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'", "Cache-Control": "no-store"}


def openapi(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI schema of the routes. Requests are read by hand (bounded, and cut off), so FastAPI knows none of
    their bodies."""
    schema = get_openapi(title="keepsight", version=__version__, routes=app.routes)
    asked = ChatRequest.model_json_schema(ref_template=_SCHEMAS + "{model}")
    parts = asked.pop("$defs")
    schema["components"] = {"schemas": {"ChatRequest": asked, **parts, "Error": _ERROR}}
    upload = {
        "type": "object",
        "required": ["file", "purpose"],
        "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"const": "vision"}},
    }
    bodies = {
        "/v1/chat/completions": ("application/json", {"$ref": f"{_SCHEMAS}ChatRequest"}),
        "/v1/files": ("multipart/form-data", upload),
    }
    refused = {"description": "An error, in OpenAI's form", "content": {"application/json": {"schema": _ERROR_AS}}}
    for route in (route for methods in schema["paths"].values() for route in methods.values()):
        route["responses"].pop("422", None)  # FastAPI's own, which is never sent
        route["responses"] |= {"4XX": refused, "5XX": refused}
    for path, (kind, body) in bodies.items():
        schema["paths"][path]["post"]["requestBody"] = {"required": True, "content": {kind: {"schema": body}}}
    return schema


def index(models: list[dict[str, Any]], address: str, chat: bool = False) -> HTMLResponse:
    """The first page: what is served, and how to call it.

    Args:
        models: OpenAI's model objects; none where only those with a key may know.
        address: the server's, as the visitor has it.
        chat: whether there is a page to try it on.
    """
    return _page("index.html", models=models, address=address.rstrip("/"), chat=chat)


def reference(schema: dict[str, Any]) -> HTMLResponse:
    """The schema, to be read by people."""
    return _page("reference.html", schema=schema)


def _page(template: str, **values: Any) -> HTMLResponse:
    return HTMLResponse(_environment().get_template(template).render(**values), headers=_HEADERS)


@functools.cache
def _environment() -> jinja2.Environment:
    found = jinja2.Environment(loader=jinja2.PackageLoader("keepsight.serve.openai", ""), autoescape=True)
    found.filters["kind"] = _kind
    return found


def _kind(about: dict[str, Any]) -> str:
    """A JSON schema in few words: `integer, 0 to 20, default 0`."""
    if "$ref" in about:
        return about["$ref"].removeprefix(_SCHEMAS)
    kinds = about.get("anyOf") or about.get("oneOf")
    if kinds:
        words = [" or ".join(_kind(kind) for kind in kinds if kind.get("type") != "null")]
    elif "const" in about or "enum" in about:
        words = [" or ".join(repr(value) for value in about.get("enum", [about.get("const")]))]
    else:
        words = [about.get("type", "anything")]
        if "items" in about:
            words = [f"list of {_kind(about['items'])}"]
    names = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    words += [f"{word} {about[name]}" for name, word in names.items() if name in about]
    words += [f"at most {about['maxItems']}"] if "maxItems" in about else []
    if about.get("default") not in (None, [], {}):
        words.append(f"default {about['default']}")
    return ", ".join(words)
