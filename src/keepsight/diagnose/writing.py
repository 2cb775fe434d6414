"""Generate outputs with the meters on; an interrupted output keeps what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from keepsight.diagnose.battery.invocation_results import Formed
from keepsight.diagnose.cases import Sample
from keepsight.diagnose.instruments.attention import AttentionMeter
from keepsight.diagnose.instruments.decay import DecayFit, fit_decay
from keepsight.diagnose.instruments.retrieval import RetrievalMeter, RetrievalTrace
from keepsight.diagnose.memories.interface import Memory
from keepsight.diagnose.reader import Reader
from keepsight.diagnose.results import Written
from keepsight.diagnose.settings import Settings
from keepsight.diagnose.task import KnownTask
from keepsight.vismem import replace_latents

Progress = Callable[[str, int, int], None]
"""Called as `progress(stage, done, total)`."""


class MeteredWriter:
    """Writes with the meters on.

    Args:
        reader: the model.
        memory: its memory, if it has one.
        settings: how much to write and to measure.
        progress: called after every token.
        task: what the model was made for, if that is known.
    """

    def __init__(
        self,
        reader: Reader,
        memory: Memory | None,
        settings: Settings,
        progress: Progress,
        task: KnownTask | None = None,
    ):
        self.reader, self.memory, self.settings, self.progress, self.task = reader, memory, settings, progress, task

    @property
    def temperature(self) -> float:
        """As set; by default the task's, else greedy."""
        if self.settings.temperature is not None:
            return self.settings.temperature
        return 0.0 if self.task is None else self.task.temperature

    def write(
        self, samples: Sequence[Sample], label: str, off: bool = False
    ) -> Iterator[tuple[Written, RetrievalTrace | None]]:
        """One output per sample; after each, and when interrupted, what there is so far.

        Args:
            samples: what to write about.
            label: for the progress.
            off: the memory is switched off. If not, it is recorded also where the first output looked, and that output
                is kept even if it is interrupted.
        """
        written: Written | None = None
        retrieval: RetrievalTrace | None = None
        for number, sample in enumerate(samples):
            name = f"{label} {number + 1}/{len(samples)}" if len(samples) > 1 else label
            one = _Output(self, sample, name, off, not off and number == 0)
            try:
                one.run()
            except KeyboardInterrupt:
                if written is None and not off and one.meter.traces:
                    written = one.written()
                    fit(written)
                if written is not None:
                    yield written, retrieval or one.retrieval
                raise
            if one.meter.traces:
                retrieval = retrieval or one.retrieval
                if written is None:
                    written = one.written()
                else:
                    written.attention.append(one.meter.trace)
                fit(written)
                yield written, retrieval


class _Output:
    """One output while it is written."""

    def __init__(self, writer: MeteredWriter, sample: Sample, label: str, off: bool, overlay: bool):
        settings, reader = writer.settings, writer.reader
        self.writer, self.sample, self.off = writer, sample, off
        layers = None if settings.layers == "all" else settings.layers
        self.meter = AttentionMeter(reader.model, layers, settings.every, where=overlay)
        looks = overlay and sample.sees and writer.memory is not None and writer.memory.always_on
        self.looks = RetrievalMeter(reader.model, settings.every) if looks else None
        self.stream = _Stream(lambda done: writer.progress(label, done, settings.steps))
        self.formed: list[Formed] = []

    def run(self) -> None:
        """Write it."""
        writer, settings = self.writer, self.writer.settings
        inputs = writer.reader.inputs(self.sample)
        options: dict[str, Any] = {"seed": settings.seed}
        notice: Any = nullcontext()
        if writer.memory is not None and not self.off:
            options = writer.memory.writing_options() | options
            notice = nullcontext() if writer.memory.always_on else replace_latents(self._note)
        self._policy = options.get("memory")
        with self.meter, self.looks or nullcontext(), notice:
            writer.reader.output(
                inputs,
                settings.steps,
                temperature=writer.temperature,
                streamer=self.stream,
                **options,
            )

    def _note(self, kind: str, latents: torch.Tensor) -> torch.Tensor:
        """A memory was formed: the words before it have been streamed by then."""
        place, extra = len(self.stream.ids), sum(f.latents + 2 for f in self.formed)
        chosen = self._policy is not None and self._policy.model_decides
        self.formed.append(Formed(place, kind, place + extra, latents.shape[1], chosen))
        return latents

    @property
    def retrieval(self) -> RetrievalTrace | None:
        """What PVM retrieved, as far as it came."""
        return self.looks.trace if self.looks is not None and self.looks.seen else None

    def written(self) -> Written:
        """The output as far as it came."""
        ids = np.array(self.stream.ids, np.int64)
        slots = np.arange(len(ids))
        for formed in self.formed:
            slots[formed.place :] += formed.latents + 2
        words = self.writer.reader.words(torch.as_tensor(ids))
        return Written(not self.off, ids, words, slots, [self.meter.trace], self.formed)


class _Stream:
    """Receives tokens from generate(), so that an interrupted output is not lost."""

    def __init__(self, tell: Callable[[int], None]):
        self.ids: list[int] = []
        self._tell, self._prompt = tell, True

    def put(self, value: torch.Tensor) -> None:
        """The prompt first, then token by token."""
        if self._prompt:
            self._prompt = False
            return
        self.ids += value.flatten().tolist()
        self._tell(len(self.ids))

    def end(self) -> None:
        """Nothing to flush."""


def fit(written: Written) -> None:
    """Fit the decay over all traces of the same length."""
    steps = min((len(trace.steps) for trace in written.attention), default=0)
    if not steps:
        return
    text = np.concatenate([trace.text_tokens[:steps] for trace in written.attention], 1)

    def fit(mass: list[np.ndarray], layer: int | None = None) -> DecayFit | None:
        chosen = [m[:steps] if layer is None else m[:steps, layer : layer + 1] for m in mass]
        return fit_decay(text, np.concatenate([np.nanmean(m, (1, 3)) for m in chosen], 1))

    mass = [trace.mass for trace in written.attention]
    written.decay = fit(mass)
    if written.decay is not None:
        written.decay_without_sink = fit([trace.mass_without_sinks for trace in written.attention])
        fits = {int(index): fit(mass, row) for row, index in enumerate(written.attention[0].layers)}
        written.decay_by_layer = {index: found for index, found in fits.items() if found is not None}
