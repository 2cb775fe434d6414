"""The whole diagnosis of one model, stage by stage, stoppable at any time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers

import keepsight
from keepsight.diagnose.battery.causal import Battery
from keepsight.diagnose.battery.invocations import InvocationCount
from keepsight.diagnose.battery.lengths import LengthScore
from keepsight.diagnose.battery.probe import Probe
from keepsight.diagnose.cases import LONG_PROMPT, Case, Sample, stand_in_images
from keepsight.diagnose.instruments.forming import watch_forming
from keepsight.diagnose.instruments.lens import LensTrace, logit_lens
from keepsight.diagnose.memories.find import carries_both, memory_of
from keepsight.diagnose.memories.interface import Memory
from keepsight.diagnose.memories.vismem import VisMemHandle
from keepsight.diagnose.reader import Reader
from keepsight.diagnose.results import Diagnosis, Written
from keepsight.diagnose.settings import Settings
from keepsight.diagnose.task import KnownTask
from keepsight.diagnose.writing import MeteredWriter, Progress
from keepsight.errors import KeepsightError


def examine(
    model: Any,
    processor: Any,
    samples: Sequence[Sample] = (),
    settings: Settings | None = None,
    control: Any | None = None,
    progress: Progress | None = None,
    task: KnownTask | None = None,
) -> Diagnosis:
    """Diagnose a VLM: does it lose its image, and is its memory used?

    Args:
        model: a supported VLM, with or without adapters, in eval mode.
        processor: its processor.
        samples: what to ask. Default: the task's own; without a task, the built-in long-description prompt about a
            built-in picture.
        settings: how much to measure.
        control: a second model on the same base, fine-tuned on the memory's own data, for the score by length.
        progress: called after every step.
        task: what the model was made for, with known facts: `keepsight.lab.cases.DigitGrids.of(processor)` for the
            reference VLM, which the command `keepsight diagnose` finds by itself.

    Returns:
        What was found. After Ctrl-C (KeyboardInterrupt) it holds what was measured until then and says so.

    Raises:
        KeepsightError: for a model, a processor or samples that cannot be used.
    """
    begin = time.perf_counter()
    settings = settings or Settings()
    reader = Reader(model, processor)
    memory = memory_of(model, settings.memory, settings.seed, settings.kind)
    if memory is None and settings.memory != "auto":
        raise KeepsightError(
            f"This model carries no {settings.memory} that is switched on, so there is none to examine."
        )
    diagnosis = Diagnosis(model=_facts(model, memory), settings=settings.as_dict())
    run = _Examination(reader, memory, diagnosis, settings, progress or (lambda stage, done, total: None), task)
    try:
        run.prepare(list(samples))
        run.curves()
        run.lens()
        run.battery()
        run.invocations()
        run.probe()
        run.lengths(None if control is None else Reader(control, processor))
    except KeyboardInterrupt:
        diagnosis.interrupted = True
        diagnosis.notes.append("Stopped by Ctrl-C; this is what was measured until then.")
    diagnosis.seconds = time.perf_counter() - begin
    return diagnosis


class _Examination:
    """The stages. Each writes what it finds into the diagnosis at once, so that stopping loses nothing."""

    def __init__(
        self,
        reader: Reader,
        memory: Memory | None,
        diagnosis: Diagnosis,
        settings: Settings,
        progress: Progress,
        task: KnownTask | None,
    ):
        self.reader, self.memory, self.diagnosis, self.task = reader, memory, diagnosis, task
        self.settings, self.progress = settings, progress
        self.latent = memory if isinstance(memory, VisMemHandle) else None  # PVM forms nothing, and is always there
        self.writer = MeteredWriter(reader, memory, settings, progress, task)
        self.samples: list[Sample] = []
        self.cases: list[Case] = []
        self.by_length: list[Case] = []

    def prepare(self, samples: list[Sample]) -> None:
        """Samples as given, or built-in ones."""
        count, seed = self.settings.samples, self.settings.seed
        self._note_memory()
        if not samples and self.task is not None:
            length = self.task.causal_length(None if self.memory is None else self.memory.method)
            try:
                self.cases = self.task.cases(min(count, 8), length, seed)
                for shorter in self.task.lengths:
                    self.by_length += self.task.cases(min(count, 8), shorter, seed + 1)
                samples = [case.sample for case in self.cases]
                self.diagnosis.notes.append(
                    f"{self.task.about}, answers near {length:,} tokens of output for the causal table."
                )
            except ImportError as error:
                self.diagnosis.notes.append(f"The model's own images and references are not used: {error}")
        if not samples:
            images = stand_in_images([_canvas()], 1, seed)[0]
            samples = [Sample(LONG_PROMPT if self.task is None else self.task.prompt, tuple(images))]
            self.diagnosis.notes.append(
                "No image was given; a built-in colour field was used. Give --image or --dataset."
            )
        self.samples = samples[:count]
        if len(samples) > count:
            self.diagnosis.notes.append(f"Of {len(samples)} samples the first {count} were used (--samples).")
        answered = [sample for sample in self.samples if sample.answer is not None]
        if not self.cases and answered:
            if len(answered) < len(self.samples):
                self.diagnosis.notes.append(
                    f"{len(self.samples) - len(answered)} samples without an answer are left out of the causal table."
                )
            self.cases = [self.reader.case(sample) for sample in answered]
        first = self.samples[0]
        self.diagnosis.prompt = first.prompt
        self.diagnosis.images = [*first.images, *(_frames(video) for video in first.videos)]
        if not any(sample.sees for sample in self.samples):
            self.diagnosis.notes.append("No prompt has an image or video, so there is nothing that could be lost.")

    # -- curves and overlay ---------------------------------------------------------------------------------------
    def curves(self) -> None:
        """Write, with the meters on; then once more with the memory off."""
        many = self.samples[: self.settings.curves]
        for written, retrieval in self.writer.write(many, "writing"):
            self.diagnosis.written, self.diagnosis.retrieval = written, retrieval
        if self.memory is not None:
            with self.memory.off():
                for written, _ in self.writer.write(many, "writing without the memory", off=True):
                    self.diagnosis.written_off = written
        if self.latent is not None and self.diagnosis.written is not None:
            self._watch_forming(self.latent, self.diagnosis.written)

    def _watch_forming(self, memory: VisMemHandle, written: Written) -> None:
        """Form the memories of the shown output again, and see where they looked."""
        plan = tuple((formed.place, formed.kind) for formed in written.memories)
        inputs, text = self.reader.inputs(self.samples[0]), torch.as_tensor(written.ids)
        layout = written.attention[0].layouts[0] if written.attention[0].layouts else None
        formers = memory.branch.formers()
        for (_, kind), (formation, _) in zip(plan, memory.formed(self.reader, inputs, text, plan), strict=True):
            written.forming.append(watch_forming(formers, kind, formation, layout))

    # -- lens -----------------------------------------------------------------------------------------------------
    def lens(self) -> None:
        """Read the written text once more, with every layer's prediction."""
        written = self.diagnosis.written
        if written is None or not len(written.ids):
            return
        self.progress("logit lens", 0, 2)
        text = torch.as_tensor(written.ids)
        self.diagnosis.lens = self._lens(text)
        self.progress("logit lens", 1, 2)
        if self.memory is not None:
            with self.memory.off():
                self.diagnosis.lens_off = self._lens(text, off=True)
        self.progress("logit lens", 2, 2)

    def _lens(self, text: torch.Tensor, off: bool = False) -> LensTrace:
        inputs, every = self.reader.inputs(self.samples[0]), max(self.settings.every, len(text) // 256, 1)
        written, memory = self.diagnosis.written, self.memory
        if off or memory is None or written is None or not written.memories:
            return logit_lens(self.reader.model, self.reader.with_text(inputs, text), len(text), every)
        plan = tuple((formed.place, formed.kind) for formed in written.memories)
        placed, longer = memory.with_memories(self.reader, inputs, text, plan)
        with longer as whole:
            return logit_lens(self.reader.model, whole, len(placed.ids), every, placed.slots)

    # -- battery and lengths --------------------------------------------------------------------------------------
    def battery(self) -> None:
        """The causal battery and the half-way swaps."""
        given: dict[str, Any] = {"cases": self.cases} if self.cases else {"samples": self.samples}
        given |= {"steps": self.settings.causal_steps, "seed": self.settings.seed}
        battery = Battery(self.reader, **given, memory=self.memory)
        self._measure("tampering", battery, partial(setattr, self.diagnosis, "causal"))
        for kind, single in ({} if self.memory is None else self.memory.single_types()).items():
            battery = Battery(self.reader, **given, memory=single, only=("off", "other image"))
            keep = partial(self.diagnosis.causal_by_type.__setitem__, kind)
            self._measure(f"tampering, {kind} memory only", battery, keep)

    def invocations(self) -> None:
        """VisMem: where memories are invoked along many outputs."""
        if self.latent is None:
            return
        count = InvocationCount(
            self.reader,
            self.latent,
            self.samples,
            self.settings.steps,
            self.writer.temperature,
            exact=self.task is not None and self.task.exact,
        )
        self._measure("invocations", count, partial(setattr, self.diagnosis, "invocations"))

    def probe(self) -> None:
        """VisMem: what its latents hold."""
        if self.latent is None:
            return
        probe = Probe(self.reader, self.latent, self.samples, self.settings.probe_images, self.settings.seed, self.task)
        self._measure("probing latents", probe, partial(setattr, self.diagnosis, "probes"))

    def _note_memory(self) -> None:
        memory, notes = self.memory, self.diagnosis.notes
        if memory is None:
            return
        if carries_both(self.reader.model):
            other = "VisMem" if memory.method == "PVM" else "PVM"
            notes.append(f"The model carries PVM and VisMem. {memory.method} is examined; {other} stays on throughout.")
        notes += memory.notes()

    def lengths(self, control: Reader | None) -> None:
        """The score by length, where there are references."""
        cases = self.by_length or (self.cases if any(case.sample.reply for case in self.cases) else [])
        free = [] if cases else [sample for sample in self.samples if sample.answer is not None]
        if not cases and not free:
            if control is not None:
                self.diagnosis.notes.append('The control has no effect without references ("answer" in the dataset).')
            return
        score = LengthScore(self.reader, cases, free, self.settings.steps, control)
        self._measure("score by length", score, partial(setattr, self.diagnosis, "lengths"))

    def _measure(self, label: str, part: Battery | InvocationCount | Probe | LengthScore, keep: Any) -> None:
        """Run a part step by step, and keep what it has found, also where it is stopped."""
        self.progress(label, 0, len(part))
        try:
            for done in part.run():
                self.progress(label, done, len(part))
        finally:
            keep(part.result())


def _facts(model: Any, memory: Memory | None) -> dict[str, Any]:
    from keepsight.backbone import Backbone

    backbone = Backbone.of(model)
    softmax = [i for i, layer in enumerate(backbone.layers) if Backbone.has_softmax_attention(layer)]
    return {
        "name": str(getattr(backbone.model, "name_or_path", "") or type(backbone.model).__name__),
        "family": backbone.family.name,
        "layers": len(backbone.layers),
        "softmax_layers": softmax,
        "attention": getattr(backbone.text_config, "_attn_implementation", None),
        "memory": None if memory is None else memory.method,
        "memory_layers": [] if memory is None else list(memory.layers),
        "memory_latents": {} if memory is None else dict(memory.sizes),
        "gates": {} if memory is None else dict(memory.gates),
        "keepsight": keepsight.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": str(next(model.parameters()).device),
        "dtype": str(next(model.parameters()).dtype),
    }


def _canvas() -> Any:
    from PIL import Image

    return Image.new("RGB", (448, 336))


def _frames(video: np.ndarray) -> list[Any]:
    from PIL import Image

    return [Image.fromarray(frame) for frame in video]
