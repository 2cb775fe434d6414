"""VisMem with vLLM as the writer. Experimental: see docs/serve-vllm.md for what it costs.

vLLM writes until an invocation token; the memory is formed beside it, by the Hugging Face model, which has to read what
was written once more, because vLLM gives nobody its hidden states; then the request is sent again with the memory in
it, as prompt embeddings. vLLM's prefix cache keeps the rest from being computed twice.

    vLLM      prompt ........... <invoke>            prompt ... <invoke> latents <end> ........... <eos>
    beside it                    reads the same, forms the memory

When memory is invoked, how often, and what may be chosen is `MemoryWriter`'s business, as on the Hugging Face path:
every token that vLLM writes goes through `LatentMemories.next`, and what it would forbid, `MemoryLimits` forbids in
vLLM's sampler.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch

from keepsight.backbone import Backbone
from keepsight.errors import KeepsightError
from keepsight.serve.errors import explain
from keepsight.serve.hf.batch import Batch
from keepsight.serve.hf.latent import LatentMemories
from keepsight.serve.hf.rows import Job, Row
from keepsight.serve.hf.sampling import end_ids
from keepsight.serve.vllm.asking import Asking, OpenAnswer
from keepsight.vismem.writing.policy import MemoryPolicy


class VllmBatch:
    """Answers that vLLM writes together. The face of `Batch`, so that the scheduler need not know.

    Args:
        llm: vLLM's `LLMEngine`, of a folder that `write_model` made.
        vocabulary: V, see there.
        model: the same model as `keepsight.load` returns it.
        tokenizer: a copy of the processor's own, for this thread alone.
        policy: when memory is invoked; default: the adapter's own.
    """

    memory, can_share = True, False

    def __init__(self, llm: Any, vocabulary: int, model: Any, tokenizer: Any, policy: MemoryPolicy | None = None):
        self.llm, self.model, self.tokenizer = llm, model, tokenizer
        latent = LatentMemories.of(model, policy)
        if latent is None:
            raise KeepsightError("This model carries no VisMem that is on; vLLM alone serves it.")
        self.latent = latent
        self.config = Backbone.of(model).model.generation_config
        self.asking = Asking(llm, vocabulary, self.config, latent)
        self.answers: list[OpenAnswer] = []
        self._names = itertools.count()

    @property
    def rows(self) -> list[Row]:
        """What is being written."""
        return [answer.row for answer in self.answers]

    def begin(self, job: Job) -> None:
        """Take a request."""
        prompt = self.asking.render(job)
        options = job.sampling.options(self.config)
        for index in range(job.choices):
            row = Row(
                job=job,
                index=index,
                ids=job.inputs["input_ids"][0].tolist(),
                tokenizer=self.tokenizer,
                do_sample=options["do_sample"],
                ends=end_ids(self.config),
                latent=self.latent.blank("image" in prompt.get("mm_placeholders", {})) if job.memory else None,
            )
            answer = OpenAnswer(row, prompt)
            self.answers.append(answer)
            self._submit(answer)
        job.source = None  # pixels stay with the answers twice: as vLLM wants them, and for the former
        job.when_read()

    def _submit(self, answer: OpenAnswer) -> None:
        """Have vLLM write on."""
        answer.request = f"keepsight-{next(self._names)}"
        self.llm.add_request(answer.request, self.asking.prompt(answer), self.asking.params(answer))
        answer.segments += 1

    # One step

    @torch.no_grad()
    def step(self) -> list[Row]:
        """Take what vLLM has written, form the memories that were invoked, and send those answers on.

        Returns:
            The rows that left: finished, failed, or cancelled.
        """
        gone = self.leave()
        if not self.answers:
            return gone
        by_name = {answer.request: answer for answer in self.answers}
        for output in self.llm.step():
            answer = by_name.get(output.request_id)
            if answer is not None and answer.request is not None:
                self._guarded(answer, self._take, output)
        waiting = [a for a in self.answers if a.row.latent is not None and a.row.latent.waiting and not a.row.is_over]
        for answer in waiting:
            self._guarded(answer, self._read)
        self.latent.form([answer.row for answer in waiting if not answer.row.is_over])
        for answer in waiting:
            if not answer.row.is_over:
                self._guarded(answer, self._insert)
        return gone + self.leave()

    @staticmethod
    def _guarded(answer: OpenAnswer, call: Any, *args: Any) -> None:
        """What fails for one answer is that answer's error, and no other's."""
        try:
            call(answer, *args)
        except Exception as error:
            answer.row.error = explain(error)

    def _take(self, answer: OpenAnswer, output: Any) -> None:
        """New tokens of one answer."""
        row, written = answer.row, output.outputs[0]
        steps = written.logprobs or [None] * len(written.token_ids)
        if output.finished:
            answer.request = None
        for inner, told in zip(written.token_ids, steps, strict=True):
            self._write(row, self.asking.outer.get(inner, inner), told)
            if row.is_over or (row.latent is not None and row.latent.waiting):
                self._abort(answer)
                return
        if output.finished:  # cannot be: vLLM ends at our ends, at an invocation, or at the length
            raise RuntimeError(f"vLLM ended a request for no reason of ours ({written.finish_reason}).")

    def _write(self, row: Row, token: int, told: Any = None) -> None:
        """One more token that vLLM chose; the policy may put an invocation in its place."""
        if row.latent is None:
            ids = [token]
        else:
            ((ids,), _) = self.latent.next([row], [token])
        memory = () if row.latent is None else self.latent.tokens.ids
        row.write(ids, memory, lambda _: self.asking.entry(token, told, row))
        row.ids += ids

    def _abort(self, answer: OpenAnswer) -> None:
        if answer.request is not None:
            self.llm.abort_request([answer.request])
            answer.request = None

    def leave(self) -> list[Row]:
        """Let the answers leave that are over."""
        over = [answer for answer in self.answers if answer.row.is_over]
        self.answers = [answer for answer in self.answers if not answer.row.is_over]
        for answer in over:
            self._abort(answer)
        return [answer.row for answer in over]

    # The memory's side

    def _read(self, answer: OpenAnswer) -> None:
        """Have the Hugging Face model read what was written since the last memory, or from the start."""
        row = answer.row
        if answer.reader is None:
            job = replace(row.job, choices=1, send=lambda _: None, when_read=lambda: None)
            answer.reader = Batch(self.model, self.tokenizer, True).read(job)
            row.latent.sight = answer.reader.rows[0].latent.sight
            answer.reader.rows[0].latent = row.latent
        row.latent.text = []
        reader = answer.reader
        known = len(reader.rows[0].ids)
        latents: list[Any] = [None] * (len(row.ids) - known)
        for start, values in answer.latents.items():
            for i, value in enumerate(values, start - known):
                if i >= 0:
                    latents[i] = value
        reader._forward([row.ids[known:]], [latents])

    def _insert(self, answer: OpenAnswer) -> None:
        """Write the memory that was formed, and have vLLM write on."""
        row = answer.row
        start = len(row.ids)
        ((ids,), (latents,)) = self.latent.next([row], [0])
        answer.latents[start] = torch.stack([value for value in latents if value is not None]).cpu()
        row.write(ids, self.latent.tokens.ids, lambda _: None)
        row.ids += ids
        if not row.is_over:
            self._submit(answer)
