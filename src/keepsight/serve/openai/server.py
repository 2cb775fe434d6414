"""Running the application: one process, uvicorn, an orderly end."""

from __future__ import annotations

import gc
import logging
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

import uvicorn

from keepsight.errors import KeepsightError


def bind(host: str, port: int) -> socket.socket:
    """Take the address before any model is loaded; connections are accepted only once `run` listens.

    Raises:
        KeepsightError: if it cannot be had.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        taken = socket.socket(family, kind)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
        # Linux lets sockets that may be reused share an address until one of them listens; a second server would find
        # out only after it has loaded its model.
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    except OSError as error:
        raise KeepsightError(
            f"{host}:{port} cannot be listened on ({error.strerror or error}). Choose another with --host and --port."
        ) from error
    return taken


def address_of(taken: socket.socket) -> str:
    """host:port, as it goes into a URL."""
    host, port = taken.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def run(app: Any, taken: socket.socket, shutdown_seconds: float, ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or Ctrl-C; then take no more connections, finish what runs, and return.

    Args:
        app: the ASGI application.
        taken: a bound socket.
        shutdown_seconds: how long what runs may take to finish; after that it is cut off.
        ready: called once requests are answered.

    Raises:
        KeyboardInterrupt: after an orderly end by Ctrl-C.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,  # ours is written by the guard, without anything of the request
        server_header=False,
        ws="none",
        lifespan="on",
        timeout_graceful_shutdown=max(1, round(shutdown_seconds)),
    )

    class Server(uvicorn.Server):
        """Says when it listens."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                ready()

    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a successor may have the address at once
    # What is there now stays to the end. Looking through half a million objects for garbage, again and again, would
    # silence all streams for that long.
    gc.collect()
    gc.freeze()
    # uvicorn raises the signal that ended it once more; SIGTERM was what we were asked to do, and no failure.
    former = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        Server(config).run(sockets=[taken])
    finally:
        signal.signal(signal.SIGTERM, former)
        taken.close()
        gc.unfreeze()


class _Brief(logging.Formatter):
    """One line per record. No tracebacks: they end with messages, and messages quote requests."""

    def formatException(self, ei: Any) -> str:
        """The type alone."""
        return getattr(ei[0], "__name__", "")

    def format(self, record: logging.LogRecord) -> str:
        """A line; starlette hands its tracebacks on as text."""
        text, traceback, _ = super().format(record).partition("Traceback (most recent call last)")
        return " ".join((text + ("stopped half-way" if traceback else "")).split())


def log_to_stderr() -> None:
    """Log requests (method, route, status, time) and where errors happened; never what was asked or answered."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Brief("%(asctime)s %(levelname)s %(message)s"))
    for name in ("keepsight.serve", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO if name == "keepsight.serve" else logging.WARNING)
