"""The scheduler: one thread that owns the model. Requests come in, events go out; nothing else touches the model.

Between two steps of the running answers at most one prompt is read, so that a crowd of newcomers does not silence those
who are being answered. Requests with memory and without, and of different adapters, run in batches of their own; so do
rows whose cache cannot be shared.
"""

from __future__ import annotations

import copy
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from keepsight.serve.errors import ApiError, cut_off, explain
from keepsight.serve.hf.batch import Batch
from keepsight.serve.hf.rows import Failed, Finished, Job, Row
from keepsight.serve.metrics import Metrics


class BatchEngine:
    """Runs requests on one model, or on several that share a base.

    Args:
        model: as `keepsight.load` returns it; what jobs get that name no model.
        tokenizer: the processor's; a copy of it is used.
        max_batch: answers that are written at the same time.
        metrics: where to count.
        others: name -> (model, tokenizer) of further ones.
    """

    #: Whether jobs must bring text and images as they came.
    wants_source = False
    takes_videos = True
    #: Parameters of requests that it cannot carry out.
    unserved: tuple[str, ...] = ()

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        max_batch: int,
        metrics: Metrics | None = None,
        others: Mapping[str, tuple[Any, Any]] | None = None,
    ):
        self.max_batch, self.metrics = max_batch, metrics or Metrics()
        # Decoding while another thread encodes with the same tokenizer is not safe.
        self.tokenizer = copy.deepcopy(tokenizer)
        self._models = {"": (model, self.tokenizer)}
        self._models |= {name: (other, copy.deepcopy(words)) for name, (other, words) in (others or {}).items()}
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._asides: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._batches: list[Batch] = []
        self._is_closing = self._is_cut_off = False
        self._last_sign = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="keepsight-engine", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a request. Any thread may call this.

        Raises:
            ApiError: 503, if the engine is closing or has died.
        """
        with self._changed:
            if self._is_closing or not self._thread.is_alive():
                raise ApiError(503, "The server is shutting down.", code="shutting_down")
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody waits for this answer any more: its slot and its memory are free before the next step. Any thread may
        call this, also for a job that is over."""
        job.is_cancelled = True
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                job.forget()

    def aside(self, call: Callable[[], Any]) -> Future[Any]:
        """Run something that needs the model, between two steps; all answers wait for it. Any thread may call this.

        Raises:
            ApiError: 503, if the engine is closing or has died.
        """
        found: Future[Any] = Future()
        with self._changed:
            if self._is_closing or not self._thread.is_alive():
                raise ApiError(503, "The server is shutting down.", code="shutting_down")
            self._asides.append((call, found))
            self._changed.notify()
        return found

    def close(self, seconds: float | None = None) -> bool:
        """Take no more requests, finish those that are here, and stop.

        Returns:
            Whether it stopped in time.
        """
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def cut_off(self) -> None:
        """End every request with an error, before the next step. Any thread may call this."""
        with self._changed:
            self._is_cut_off = True
            self._changed.notify()

    def silence(self) -> float | None:
        """Seconds since the engine last showed that it moves; None if its thread has died."""
        return time.monotonic() - self._last_sign if self._thread.is_alive() else None

    @property
    def running(self) -> int:
        """Answers that are being written."""
        return sum(len(batch.rows) for batch in self._batches)

    # The thread

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._asides or self._batches or self._is_closing):
                    self._changed.wait(timeout=1.0)
                    self._last_sign = time.monotonic()
                if self._is_closing and not (self._waiting or self._asides or self._batches):
                    return
                if self._is_cut_off:
                    self._end_all()
                job = self._next_job()
                aside = self._asides.popleft() if self._asides else None
            if aside is not None:
                self._run_aside(*aside)
            try:
                if job is not None:
                    self._read(job)
                self._step()
            except Exception as error:  # nothing should get here; if it does, nobody must wait for ever
                if job is not None:
                    self._fail(job, error)
                for batch in list(self._batches):
                    self._drop(batch, error)
            self._last_sign = time.monotonic()
            self.metrics.running.set(self.running)

    def _run_aside(self, call: Callable[[], Any], found: Future[Any]) -> None:
        if not found.set_running_or_notify_cancel():
            return
        try:
            found.set_result(call())
        except Exception as error:
            found.set_exception(explain(error))
        self._last_sign = time.monotonic()

    def _end_all(self) -> None:
        for _, found in self._asides:
            found.cancel()
        self._asides.clear()
        for job in (*self._waiting, *(row.job for batch in self._batches for row in batch.rows)):
            self._fail(job, cut_off())
        for job in self._waiting:
            job.forget()
        self._waiting.clear()

    def _next_job(self) -> Job | None:
        """The oldest request, if there is room for all its answers. First come, first served."""
        if self._waiting and self.running + self._waiting[0].choices <= self.max_batch:
            return self._waiting.popleft()
        return None

    def _read(self, job: Job) -> None:
        started = time.monotonic()
        self.metrics.queue_seconds.observe(started - job.arrived)
        try:
            batch = Batch(*self._models[job.model], job.memory).read(job)
        except Exception as error:
            self._fail(job, error)
            self.metrics.finished.labels("error").inc(job.choices)
            return
        finally:
            job.forget()
        self.metrics.prefill_seconds.observe(time.monotonic() - started)
        self.metrics.prompt_tokens.inc(job.prompt_tokens)
        host = next((b for b in self._batches if b.can_take(batch)), None)
        if host is None:
            self._batches.append(batch)
            return
        try:
            host.join(batch)
        except Exception as error:  # half-way through the layers: neither can go on
            self._drop(batch, error)
            self._drop(host, error)

    def _step(self) -> None:
        for batch in list(self._batches):
            started = time.monotonic()
            try:
                gone = batch.step()
            except Exception as error:
                self._drop(batch, error)
                continue
            self.metrics.step_seconds.observe(time.monotonic() - started)
            for row in gone:
                self._finish(row)
        self._batches = [batch for batch in self._batches if batch.rows]

    def _finish(self, row: Row) -> None:
        job = row.job
        if row.error is not None:
            self._fail(job, row.error)
        if job.error is not None:
            self.metrics.finished.labels("error").inc()
        elif job.is_cancelled:
            self.metrics.finished.labels("cancelled").inc()
        else:
            assert row.reason is not None
            self.metrics.finished.labels(row.reason).inc()
            self.metrics.completion_tokens.inc(row.written)
            for invocation in row.invocations:
                self.metrics.invocations.labels(invocation.kind).inc()
            job.send(Finished(row.index, row.reason, row.written, row.memory_tokens, row.invocations))

    def _fail(self, job: Job, error: Exception) -> None:
        """End a request with an error; its other answers end too, and nobody else's."""
        if job.error is None and not job.is_cancelled:
            job.error = explain(error)
            job.is_cancelled = True
            job.send(Failed(job.error))

    def _drop(self, batch: Batch, error: Exception) -> None:
        """A batch that cannot go on: the last resort, for errors that are nobody's."""
        for row in batch.rows:
            row.error = row.error or explain(error)
            self._finish(row)
        self._batches = [other for other in self._batches if other is not batch]
