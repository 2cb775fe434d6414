"""What vLLM is asked for one answer of a VisMem: the prompt with memories in it, and how tokens are chosen."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any

import torch

from keepsight.serve.hf.batch import Batch
from keepsight.serve.hf.latent import LatentMemories
from keepsight.serve.hf.rows import Job, Row
from keepsight.serve.vllm.check import UnsupportedVllmError
from keepsight.vismem.tokens import TYPES

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


class Asking:
    """Puts answers into vLLM's words.

    Args:
        llm: vLLM's `LLMEngine`.
        vocabulary: V, rows of the base's embedding; vLLM has the special tokens behind them.
        config: the model's generation config.
        latent: the model's latent memories.

    Attributes:
        inner: id of a special token -> its id in vLLM.
        outer: the reverse.
    """

    def __init__(self, llm: Any, vocabulary: int, config: Any, latent: LatentMemories):
        self.llm, self.vocabulary, self.config, self.latent = llm, vocabulary, config, latent
        special = latent.tokens.ids
        self.inner = {token: vocabulary + i for i, token in enumerate(special)}
        self.outer = {inner: token for token, inner in self.inner.items()}
        self._hidden = [token for token in special if token < vocabulary]  # columns of the base that ours replace

    def render(self, job: Job) -> dict[str, Any]:
        """The prompt of a request as vLLM reads it."""
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

    def prompt(self, answer: OpenAnswer) -> Any:
        """What has been written, images and latents included, as vLLM takes it."""
        from vllm.inputs.engine import mm_input, tokens_input
        from vllm.multimodal.inputs import (
            MultiModalFieldElem,
            MultiModalKwargsItem,
            MultiModalKwargsItems,
            MultiModalSharedField,
            PlaceholderRange,
        )

        inner = self.inner if answer.row.latent is not None else {}
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
            return mm_input(ids, MultiModalKwargsItems(items), hashes, places)
        return tokens_input(ids)

    def params(self, answer: OpenAnswer) -> Any:
        """How vLLM chooses the tokens of this request."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        from keepsight.serve.vllm.limits import KEY

        row, sampling, config = answer.row, answer.row.job.sampling, self.config
        options = sampling.options(config)
        told = {
            "never": [*self.outer] if row.latent is None else self._never(),
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
        stops = [*row.ends, *(self.inner[i] for i in self.latent.tokens.invoke.values())]
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
        return [inner for token, inner in self.inner.items() if token not in admitted] + self._hidden

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
            found.append([self.inner[writer.tokens.invoke[kind]], first, end])
        return found

    def entry(self, token: int, told: Any, row: Row) -> Any:
        """Log-probabilities as the protocol wants them: (id, its own, [(id, of the likeliest)]).

        vLLM's are over all columns. Those that this request does not have are taken out, as far as they are among the
        likeliest: the special tokens without memory; with it, what the base has at their ids.
        """
        foreign = self._hidden if row.latent is not None else [*self.outer]
        share = min(sum(math.exp(found.logprob) for i, found in told.items() if i in foreign), 1 - 1e-9)
        found = {self.outer.get(i, i): f.logprob - math.log1p(-share) for i, f in told.items() if i not in foreign}
        likeliest = sorted(found.items(), key=lambda one: -one[1])
        return token, found[token], likeliest[: row.job.sampling.logprobs]


def _digest(latents: torch.Tensor) -> str:
    """What the prefix cache knows latents by: their content."""
    return hashlib.sha256(latents.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
