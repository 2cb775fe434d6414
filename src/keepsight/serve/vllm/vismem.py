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

import hashlib
import itertools
import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from keepsight.backbone import Backbone
from keepsight.errors import KeepsightError
from keepsight.serve.errors import explain
from keepsight.serve.hf.batch import Batch
from keepsight.serve.hf.latent import LatentMemories
from keepsight.serve.hf.rows import Job, Row
from keepsight.serve.hf.sampling import end_ids
from keepsight.serve.vllm.check import UnsupportedVllmError
from keepsight.vismem.tokens import TYPES
from keepsight.vismem.writing.policy import MemoryPolicy

#: vLLM's own limit, and OpenAI's.
_MOST_LOGPROBS = 20


@dataclass(eq=False)
class OpenAnswer:
    """One answer while vLLM writes it.

    Attributes:
        row: what was written, and its text.
        prompt: the prompt as vLLM takes it, images included.
        latents: id of a position in `row.ids` -> the latents [N, D] that begin there.
        reader: the same answer on the Hugging Face path, once a memory was invoked.
        request: name of vLLM's request in progress.
        segments: requests so far.
    """

    row: Row
    prompt: dict[str, Any]
    latents: dict[int, torch.Tensor] = field(default_factory=dict)
    reader: Batch | None = None
    request: str | None = None
    segments: int = 0


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
        self.llm, self.vocabulary, self.model, self.tokenizer = llm, vocabulary, model, tokenizer
        latent = LatentMemories.of(model, policy)
        if latent is None:
            raise KeepsightError("This model carries no VisMem that is on; vLLM alone serves it.")
        self.latent = latent
        self.config = Backbone.of(model).model.generation_config
        self.answers: list[OpenAnswer] = []
        self._names = itertools.count()
        special = self.latent.tokens.ids
        self._inner = {token: vocabulary + i for i, token in enumerate(special)}
        self._outer = {inner: token for token, inner in self._inner.items()}
        self._hidden = [token for token in special if token < vocabulary]  # columns of the base that ours replace

    @property
    def rows(self) -> list[Row]:
        """What is being written."""
        return [answer.row for answer in self.answers]

    def begin(self, job: Job) -> None:
        """Take a request."""
        prompt = self._render(job)
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

    def _render(self, job: Job) -> dict[str, Any]:
        assert job.source is not None
        text, images = job.source
        prompt: dict[str, Any] = {"prompt": text}
        if images:
            prompt["multi_modal_data"] = {"image": images}
        renderer = self.llm.renderer
        (rendered,) = renderer.render_cmpl(
            [prompt], renderer.default_cmpl_tok_params.with_kwargs(add_special_tokens=False)
        )
        if rendered["prompt_token_ids"] != job.inputs["input_ids"][0].tolist():
            raise UnsupportedVllmError("vLLM's processor makes other tokens of this prompt than transformers' does.")
        return rendered

    # vLLM's side

    def _submit(self, answer: OpenAnswer) -> None:
        """Have vLLM write on."""
        from vllm.inputs.engine import mm_input, tokens_input
        from vllm.multimodal.inputs import (
            MultiModalFieldElem,
            MultiModalKwargsItem,
            MultiModalKwargsItems,
            MultiModalSharedField,
            PlaceholderRange,
        )

        inner = self._inner if answer.row.latent is not None else {}
        ids = [inner.get(i, i) for i in answer.row.ids]  # a copy: ours grows while vLLM has its own
        if answer.latents or answer.prompt["type"] == "multimodal":
            items, hashes, places = (
                dict(answer.prompt.get(n, {})) for n in ("mm_kwargs", "mm_hashes", "mm_placeholders")
            )
            if answer.latents:
                items["prompt_embeds"], hashes["prompt_embeds"], places["prompt_embeds"] = [], [], []
            for start, latents in sorted(answer.latents.items()):
                data = MultiModalFieldElem(data=latents, field=MultiModalSharedField(batch_size=1))
                items["prompt_embeds"].append(MultiModalKwargsItem({"embedding": data}))
                hashes["prompt_embeds"].append(_digest(latents))
                places["prompt_embeds"].append(PlaceholderRange(offset=start, length=len(latents)))
            prompt: Any = mm_input(ids, MultiModalKwargsItems(items), hashes, places)
        else:
            prompt = tokens_input(ids)
        answer.request = f"keepsight-{next(self._names)}"
        self.llm.add_request(answer.request, prompt, self._params(answer))
        answer.segments += 1

    def _params(self, answer: OpenAnswer) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        from keepsight.serve.vllm.limits import KEY

        row, sampling, config = answer.row, answer.row.job.sampling, self.config
        options = sampling.options(config)
        told = {
            "never": [*self._outer] if row.latent is None else self._never(),
            "while": [] if row.latent is None else self._while(row),
            "prompt": row.job.prompt_tokens,
            "words": self.vocabulary,
            "repetition": options.get("repetition_penalty", config.repetition_penalty or 1.0),
            "frequency": sampling.frequency_penalty,
            "presence": sampling.presence_penalty,
        }
        seed = sampling.seed
        if seed is not None:  # another for every answer and every request, or all would draw the same
            seed = (seed + row.index + 1_000_003 * answer.segments) % 2**63
        stops = [*row.ends, *(self._inner[i] for i in self.latent.tokens.invoke.values())]
        return SamplingParams(
            max_tokens=row.room,
            temperature=options.get("temperature", 0.0),
            top_p=options.get("top_p", config.top_p or 1.0) if row.do_sample else 1.0,
            top_k=options.get("top_k", config.top_k or 0) if row.do_sample else 0,
            min_p=options.get("min_p", config.min_p or 0.0) if row.do_sample else 0.0,
            seed=seed if row.do_sample else None,
            logit_bias=sampling.logit_bias or None,
            logprobs=None if sampling.logprobs is None else _MOST_LOGPROBS,
            stop_token_ids=stops,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args={KEY: told},
        )

    def _never(self) -> list[int]:
        admitted = [self.latent.tokens.invoke[kind] for kind in TYPES if self.latent.writer.policy.admits(kind)]
        return [inner for token, inner in self._inner.items() if token not in admitted] + self._hidden

    def _while(self, row: Row) -> list[list[int]]:
        """[id, first, end]: from which to before which token of this request each type may be invoked. Asked of the
        writer, which never allows it before so many words, and never again once there is no room."""
        writer, room = self.latent.writer, row.room
        found = []
        for kind in TYPES:
            if not writer.policy.admits(kind):
                continue
            since = row.latent.since
            first = next((n for n in range(room + 1) if writer.may_follow(row.latent, since + n)), room + 1)
            end = next((n for n in range(room + 1) if not writer.has_room(row.latent, kind, room - n)), room + 1)
            found.append([self._inner[writer.tokens.invoke[kind]], first, end])
        return found

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
            self._write(row, self._outer.get(inner, inner), told)
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
        row.write(ids, memory, lambda _: self._entry(token, told, row))
        row.ids += ids

    def _entry(self, token: int, told: Any, row: Row) -> Any:
        """Log-probabilities as the protocol wants them: (id, its own, [(id, of the likeliest)]).

        vLLM's are over all columns. Those that this request does not have are taken out, as far as they are among the
        likeliest: the special tokens without memory; with it, what the base has at their ids.
        """
        foreign = self._hidden if row.latent is not None else [*self._outer]
        share = min(sum(math.exp(found.logprob) for i, found in told.items() if i in foreign), 1 - 1e-9)
        found = {self._outer.get(i, i): f.logprob - math.log1p(-share) for i, f in told.items() if i not in foreign}
        likeliest = sorted(found.items(), key=lambda one: -one[1])
        return token, found[token], likeliest[: row.job.sampling.logprobs]

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


def _digest(latents: torch.Tensor) -> str:
    """What the prefix cache knows latents by: their content."""
    return hashlib.sha256(latents.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
