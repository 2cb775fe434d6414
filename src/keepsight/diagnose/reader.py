"""A model with its processor: prepare inputs, read texts, generate texts, one sample at a time."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from keepsight.backbone import Backbone
from keepsight.data.collate import may_refuse, require_chat_template
from keepsight.diagnose.cases import Case, Sample
from keepsight.diagnose.memories.interface import Plan
from keepsight.diagnose.memories.invoked import active_latent_memory, given, parsed
from keepsight.diagnose.memories.tampering import Contents
from keepsight.errors import KeepsightError, KeepsightWarning
from keepsight.vismem import Invocation, MemoryPolicy
from keepsight.vismem.sequences import WordLimit


@dataclass(frozen=True)
class Output:
    """What a model wrote.

    Attributes:
        text: [n] token ids, memories left out.
        plan: where memories were formed: (text tokens before it, type) of each.
        invocations: VisMem's records of them, with their latents.
    """

    text: torch.Tensor
    plan: Plan = ()
    invocations: tuple[Invocation, ...] = ()


class Reader:
    """A model with its processor: makes inputs, reads texts, writes texts. Batch size 1, so nothing is padded.

    Args:
        model: a supported VLM, with or without adapters.
        processor: its processor.
    """

    def __init__(self, model: Any, processor: Any):
        require_chat_template(processor)
        self.model, self.processor, self.backbone = model, processor, Backbone.of(model)
        branch = active_latent_memory(model)
        #: Which ids are a latent memory's; None if the model has none.
        self.latent_tokens = None if branch is None else branch.tokens

    def inputs(self, sample: Sample) -> dict[str, torch.Tensor]:
        """Model inputs of the prompt, one row.

        Raises:
            KeepsightError: if the processor cannot read the images (it says why).
        """
        prompt = self.processor.apply_chat_template(sample.messages, tokenize=False, add_generation_prompt=True)
        given: dict[str, Any] = {"text": [prompt], "add_special_tokens": False, "return_tensors": "pt"}
        if sample.images:
            given["images"] = [list(sample.images)]
        if sample.videos:
            frames = [torch.from_numpy(np.ascontiguousarray(v.transpose(0, 3, 1, 2))) for v in sample.videos]
            given |= {"videos": frames, "do_sample_frames": False}
        sizes = [f"{image.width}x{image.height}" for image in sample.images]
        sizes += [f"{v.shape[0]} frames of {v.shape[2]}x{v.shape[1]}" for v in sample.videos]
        with may_refuse(self.processor, ", ".join(sizes) or "the text"):
            inputs = self.processor(**given)
        return dict(inputs.to(self.model.device))

    def with_text(self, inputs: dict[str, torch.Tensor], text: torch.Tensor) -> dict[str, torch.Tensor]:
        """The inputs with token ids after the prompt: [n], or [B, n] for prompts of B rows."""
        longer = dict(inputs)
        tail = torch.atleast_2d(text.to(inputs["input_ids"].device))
        longer["input_ids"] = torch.cat([inputs["input_ids"], tail], 1)
        for name in ("attention_mask", "mm_token_type_ids", "token_type_ids"):
            if name in longer:
                behind = torch.full_like(tail, self.backbone.value_behind(name), dtype=longer[name].dtype)
                longer[name] = torch.cat([longer[name], behind], 1)
        return longer

    @torch.no_grad()
    def logits(self, inputs: dict[str, torch.Tensor], text: torch.Tensor) -> torch.Tensor:
        """Logits [n, V] of each next token of `text` [n]."""
        longer = self.with_text(inputs, text)
        return self.model(**longer, use_cache=False, logits_to_keep=len(text) + 1).logits[0, -len(text) - 1 : -1]

    def log_probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [n, V] as log-probabilities [n, V] float32. A latent memory's tokens are no words: they get none of
        the probability, with the memory on or off, so that both can be compared."""
        logits = logits.float()
        if self.latent_tokens is not None:
            known = [i for i in self.latent_tokens.ids if i < logits.shape[-1]]
            logits = logits.index_fill(-1, torch.tensor(known, dtype=torch.long, device=logits.device), -torch.inf)
        return logits.log_softmax(-1)

    def read(self, inputs: dict[str, torch.Tensor], text: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [n, V] float32 at which the model would write each next token of `text` [n].

        A latent memory is not invoked here; `Memory.read` does that.
        """
        return self.log_probabilities(self.logits(inputs, text))

    def write(self, inputs: dict[str, torch.Tensor], steps: int, **options: Any) -> torch.Tensor:
        """The text [n] of `output`."""
        return self.output(inputs, steps, **options).text

    @torch.no_grad()
    def output(
        self,
        inputs: dict[str, torch.Tensor],
        steps: int,
        exact: bool = True,
        temperature: float = 0.0,
        memory: MemoryPolicy | None = None,
        contents: Contents | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> Output:
        """What the model writes.

        Args:
            inputs: of the prompt (and text so far).
            steps: at most so many text tokens.
            exact: exactly so many: the end token is held back, so that long outputs can be measured.
            temperature: 0 always takes the likeliest token.
            memory: when a latent memory is invoked; default: the adapter's policy.
            contents: its latents, in place of those that are formed.
            seed: of sampling and of policies that invoke at random; the random state stays as it was.
            options: further arguments of generate().
        """
        branch = active_latent_memory(self.model)
        # a typed placeholder is no image and would confuse everything
        hold = list(self.backbone.visual_token_ids())
        length, prompt = steps, inputs["input_ids"].shape[1]
        if branch is None:
            hold += self.latent_tokens.ids if self.latent_tokens is not None else []
        elif memory is None or memory.name != "off":
            length += branch.config.most_positions
            limit = WordLimit(branch.tokens, prompt, steps)
            options |= {"return_dict_in_generate": True, "stopping_criteria": [limit]}
        if branch is not None and memory is not None:
            options["memory"] = memory
        if exact:
            options["min_new_tokens"] = length
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        options |= sampling if temperature else sampling | no_sampling(self.model)
        device = next(self.model.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            with given(contents), warnings.catch_warnings():
                warnings.simplefilter("ignore", KeepsightWarning)  # of untrained memories; the diagnosis says it itself
                out = self.model.generate(**inputs, max_new_tokens=length, suppress_tokens=hold, **options)
        if torch.is_tensor(out):
            return Output(out[0, prompt:].cpu())
        assert branch is not None
        text, plan = parsed(out.sequences[0, prompt:].cpu(), branch.tokens)
        return Output(text, plan, tuple(out.invocations[0][: len(plan)]))

    def tokens(self, text: str) -> torch.Tensor:
        """Token ids [n] of a piece of a reply."""
        return torch.tensor(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)

    def words(self, ids: torch.Tensor) -> list[str]:
        """Each token as the text it adds."""
        tokenizer = self.processor.tokenizer
        texts = [tokenizer.decode([int(i)]) for i in ids]
        whole = tokenizer.decode(ids.tolist())
        joined = "".join(texts)
        if joined == whole:
            return texts
        return _aligned(texts, whole)

    def case(self, sample: Sample) -> Case:
        """A sample with a reference as a case: the reply, then the answer, which is what is scored."""
        assert sample.answer is not None
        gap = " " if sample.reply and not (sample.reply[-1].isspace() or sample.answer[:1].isspace()) else ""
        before, whole = self.tokens(sample.reply), self.tokens(sample.reply + gap + sample.answer)
        start = 0
        while start < min(len(before), len(whole)) and before[start] == whole[start]:
            start += 1
        if start == len(whole):
            raise KeepsightError(f"The answer {sample.answer!r} has no tokens; give a reference with text in it.")
        return Case(sample, whole, [(start, len(whole))])


def no_sampling(model: Any) -> dict[str, Any]:
    """Greedy generation without warnings about the sampling settings that many checkpoints ship."""
    config = getattr(Backbone.of(model).model, "generation_config", None)
    names = ("temperature", "top_p", "top_k", "min_p", "typical_p")
    return {name: None for name in names if getattr(config, name, None) is not None}


def _aligned(texts: list[str], whole: str) -> list[str]:
    """Give each token the blanks that the whole text shows before it (word-level tokenizers drop them)."""
    found, at = [], 0
    for text in texts:
        stripped = text.strip()
        place = whole.find(stripped, at) if stripped else -1
        if place < 0 or place > at + 2:
            found.append(text if text else "")
            continue
        found.append(whole[at:place] + stripped)
        at = place + len(stripped)
    return found
