"""Between the web server's loop and the engine's thread: events come back, and images wait for their turn."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from keepsight.serve.hf.rows import Failed, Finished, Piece
from keepsight.serve.metrics import Metrics
from keepsight.serve.openai.http import Gone


class Events:
    """Carries events from the engine's thread to the task that waits for them.

    Args:
        at_once: pieces of text are handed over as they come. Otherwise they wait for the end of their answer, because
            waking the other thread for every token costs the engine time.
        gone: done when the client has left.
    """

    def __init__(self, at_once: bool, gone: asyncio.Future[None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self._at_once = at_once
        self._held: list[Any] = []
        gone.add_done_callback(lambda _: self._queue.put_nowait(Gone()))

    def send(self, event: Any) -> None:
        """From the engine's thread; never waits."""
        self._held.append(event)
        if self._at_once or not isinstance(event, Piece):
            held, self._held = self._held, []
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._take, held)

    def _take(self, events: list[Any]) -> None:
        for event in events:
            self._queue.put_nowait(event)

    async def next(self) -> Piece | Finished:
        """The next event.

        Raises:
            ApiError: if the request failed.
            Gone: if the client left.
        """
        event = await self._queue.get()
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Gone):
            raise event
        return event


class Turn:
    """A request's turn to have its images in memory: from decoding until the engine has read the prompt.

    Args:
        places: how many there are.
        metrics: where to count those who wait.
    """

    def __init__(self, places: asyncio.Semaphore, metrics: Metrics):
        self._places, self._metrics = places, metrics
        self._loop = asyncio.get_running_loop()
        self._has_place, self._is_over = False, False
        metrics.waiting.inc()

    async def wait(self, gone: asyncio.Future[None]) -> None:
        """Wait for a place.

        Raises:
            Gone: if the client leaves before.
        """
        place = asyncio.ensure_future(self._places.acquire())
        try:
            both: list[asyncio.Future[Any]] = [place, gone]
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if place.done() and not place.cancelled():
                self._has_place = True
            else:
                place.cancel()
        if not self._has_place:
            raise Gone

    def end(self) -> None:
        """Give the place back, if that has not been done. Any thread may call this."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        if self._is_over:
            return
        self._is_over = True
        self._metrics.waiting.dec()
        if self._has_place:
            self._places.release()
