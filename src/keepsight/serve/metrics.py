"""What Prometheus is told. Counts and times only: no text, no images, no client."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_TOKEN_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3)


class Metrics:
    """The counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)

        def make(kind: Any, name: str, help_: str, labels: tuple[str, ...] = (), **more: Any) -> Any:
            return kind(f"keepsight_{name}", help_, labels, registry=self.registry, **more)

        self.responses = make(Counter, "responses", "HTTP answers by path and status", ("path", "status"))
        self.finished = make(Counter, "choices", "Answers by how they ended", ("reason",))
        self.prompt_tokens = make(Counter, "prompt_tokens", "Tokens read, visual ones included")
        self.completion_tokens = make(Counter, "completion_tokens", "Positions written, memories included")
        self.images = make(Counter, "images", "Images read")
        self.invocations = make(Counter, "memory_invocations", "Latent memories formed", ("kind",))
        self.running = make(Gauge, "running_choices", "Answers that are being written")
        self.waiting = make(Gauge, "waiting_requests", "Requests that wait for a place")
        self.open = make(Gauge, "open_requests", "Requests that hold a slot, from arrival to last byte")
        self.queue_seconds = make(Histogram, "queue_seconds", "From arrival to reading", buckets=_SECONDS)
        self.prefill_seconds = make(Histogram, "prefill_seconds", "Reading a prompt", buckets=_SECONDS)
        self.step_seconds = make(Histogram, "step_seconds", "One step of all running answers", buckets=_TOKEN_SECONDS)

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self.registry)
