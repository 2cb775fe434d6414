"""What a client is told when something is wrong, in OpenAI's words."""

from __future__ import annotations

import logging
from typing import Any

from starlette.exceptions import HTTPException

from keepsight.errors import KeepsightError

_ROUTES = ("/", "/docs", "/v1/chat/completions", "/v1/models", "/v1/files", "/health", "/metrics")

log = logging.getLogger("keepsight.serve")


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: HTTP status.
        message: what was found, what was expected, what to write instead. It may quote the request, so it goes to the
            client and never to a log.
        param: the parameter at fault.
        code: a word for programs.
        headers: further headers. 429 and 503 say when to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = ({"Retry-After": "1"} if status in (429, 503) else {}) | (headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON that OpenAI's clients read errors from."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request cannot be understood or carried out."""
    return ApiError(400, message, param=param, code=code)


def too_large(message: str, param: str | None = None, code: str = "too_large") -> ApiError:
    """413: a limit on size is exceeded."""
    return ApiError(413, message, param=param, code=code)


def cut_off() -> ApiError:
    """503: the server ends, and what it had left to do took too long."""
    return ApiError(503, "The server was stopped before the answer was complete.", code="shutting_down")


def no_route(method: str, error: HTTPException) -> ApiError:
    """A route or a method that there is none of."""
    message, code = str(error.detail), None
    if error.status_code == 404:
        message, code = f"There is nothing here. This server has {', '.join(_ROUTES)}.", "unknown_route"
    elif error.status_code == 405:
        message, code = f"{method} is not served here.", "method_not_allowed"
    return ApiError(error.status_code, message, code=code, headers=dict(error.headers or {}))


def explain(error: Exception) -> ApiError:
    """What the client is told of a failure on our side; the log is told where it happened."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, KeepsightError):  # what this model cannot do, said for those who ask
        return bad(str(error), "messages", "not_possible")
    log_error("a request failed", error)
    if isinstance(error, FloatingPointError):
        return ApiError(500, f"{error} The weights are damaged, or the dtype overflows.", code="not_a_number")
    if type(error).__name__ == "OutOfMemoryError" or "out of memory" in str(error).lower():
        return ApiError(
            503, "Out of memory. Send a shorter prompt, smaller images, or try later.", code="out_of_memory"
        )
    return ApiError(500, f"The model failed on this request ({type(error).__name__}).", code="model_failure")


def log_error(what: str, error: Exception) -> None:
    """Log where an error happened, and not what it says: its message may quote a request."""
    frames = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        frames.append(f"{code.co_filename.rpartition('/')[2]}:{trace.tb_lineno} {code.co_name}")
        trace = trace.tb_next
    log.error("%s: %s at %s", what, type(error).__name__, " < ".join(reversed(frames[-6:])))
