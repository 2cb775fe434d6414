"""Rollouts with memory: trajectories written by the model's own decoding, and their counterfactuals.

A prompt is what the processor makes of one conversation: a dict of model inputs with one row. A trajectory is what the
model wrote after it. Every trajectory is drawn from a seed of its own, so it does not depend on which others are
beside it: one process or eight, one call or ten, the same trajectories (up to rounding of the model itself).

Counterfactuals share a trajectory's beginning up to its first invocation, and then go on without memory, or with the
other type. Those without memory can be written beside the trajectories, in the same batch (`shadow_seeds`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import StoppingCriteriaList

from keepsight.backbone import Backbone
from keepsight.errors import KeepsightWarning
from keepsight.train.vismem.prompts import Prompt, padding_id, stack_prompts
from keepsight.vismem import Invocation, MemoryPolicy, Replay, RolloutOptions, VisMemBranch
from keepsight.vismem.sequences import WordLimit
from keepsight.vismem.tokens import LONG, SHORT, TYPES
from keepsight.vismem.writing.policy import NO_MEMORY

#: What a trajectory is held against: the same beginning without memory, or with the other type of it.
Counterfactual = Literal["without", "other"]


@dataclass(frozen=True)
class Trajectory:
    """What the model wrote after one prompt.

    Attributes:
        prompt: index of the prompt among those given.
        ids: [T], memories included (as `<invoke> <end> ... <end>`), up to the last chosen token.
        chosen: bool [T], where the model chose the token (so, what it is trained on).
        admitted: bool [T, 2], where the model could have chosen to invoke a short / a long memory.
        invocations: its memories; `position` is an index into `ids`.
        without: what was written beside it from its first memory on, without any; None if it was not asked for.
    """

    prompt: int
    ids: torch.Tensor
    chosen: torch.Tensor
    admitted: torch.Tensor
    invocations: list[Invocation] = field(repr=False)
    without: Trajectory | None = field(default=None, repr=False)

    @property
    def invoked(self) -> bool:
        """Whether it holds a memory."""
        return bool(self.invocations)

    @property
    def words(self) -> int:
        """Tokens of text that the model chose."""
        return int(self.chosen.sum()) - sum(int(self.chosen[i.position]) for i in self.invocations)

    def count(self, kind: str) -> int:
        """How many memories of a type it holds."""
        return sum(invocation.kind == kind for invocation in self.invocations)


def row_seed(*parts: Any) -> int:
    """A seed made of names and numbers: the same on every machine, in every process."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def banned_ids(model: Any) -> tuple[int, ...]:
    """Ids that are never drawn, and have no share in any log-probability: placeholders of images, ends of memories.

    A placeholder in the text would be taken for an image whose pixels are missing.
    """
    branch = VisMemBranch.of(model)
    return (*branch.backbone.visual_token_ids(), *branch.tokens.end.values())


@torch.no_grad()
def sample(
    model: Any,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    policy: MemoryPolicy,
    *,
    copies: int = 1,
    max_words: int,
    temperature: float = 1.0,
    rows_per_call: int | None = None,
    replays: Sequence[Replay | None] | None = None,
    shadow_seeds: Sequence[int] | None = None,
) -> list[Trajectory]:
    """Write trajectories, with KV cache, in batches. A prompt is read once for all its copies in a batch.

    Drawn from the model's whole distribution at `temperature`: what the model's generation config says of top-k, top-p
    and repetition is left out, since the log-probabilities in training know nothing of it, and whatever else in it
    would change the distribution (a typical_p, a sequence_bias ...) is an error that names it.

    Args:
        model: carries VisMem; in eval mode.
        prompts: model inputs of one row each.
        seeds: one per trajectory: `len(prompts) * copies`.
        policy: when memory is invoked.
        copies: trajectories per prompt, next to each other in the result.
        max_words: longest text, in tokens; memories do not count.
        temperature: of sampling.
        rows_per_call: at most so many trajectories at once; None: all. Shadows come on top, at most as many.
        replays: one per trajectory, what to write first.
        shadow_seeds: one per trajectory: also write what would have been written without memory, from its first memory
            on. The same as `counterfactuals(..., "without")` with these seeds, at no step of its own.
    """
    assert len(seeds) == len(prompts) * copies
    limit = rows_per_call or len(seeds)
    found: list[Trajectory] = []
    for some, rows, count in _calls(len(prompts), copies, limit):
        options = RolloutOptions(
            seeds=list(seeds[rows]),
            replay=None if replays is None else list(replays[rows]),
            shadows=None if shadow_seeds is None else list(shadow_seeds[rows]),
            copies=count,
            plain=True,
        )
        found += _call(model, prompts[some], policy, options, max_words, temperature, some.start)
    return found


def _calls(prompts: int, copies: int, limit: int) -> Iterator[tuple[slice, slice, int]]:
    """(prompts, trajectories, copies) of each call of at most `limit` trajectories: whole groups, or parts of one."""
    if copies <= limit:
        step = limit // copies
        for first in range(0, prompts, step):
            last = min(first + step, prompts)
            yield slice(first, last), slice(first * copies, last * copies), copies
        return
    for prompt in range(prompts):
        for first in range(0, copies, limit):
            count = min(limit, copies - first)
            start = prompt * copies + first
            yield slice(prompt, prompt + 1), slice(start, start + count), count


def _call(
    model: Any,
    prompts: Sequence[Prompt],
    policy: MemoryPolicy,
    options: RolloutOptions,
    words: int,
    temperature: float,
    first: int,
) -> list[Trajectory]:
    branch, base = VisMemBranch.of(model), Backbone.of(model).model
    config, tokens = branch.config, branch.tokens
    pad = padding_id(base)
    inputs = {n: v.to(base.device) for n, v in stack_prompts(prompts, pad).items()}
    length = inputs["input_ids"].shape[1]
    memories = config.max_invocations if policy.max_invocations is None else policy.max_invocations
    room = words + memories * (2 + max(config.num_short, config.num_long))
    with warnings.catch_warnings():
        # A memory in training is untrained at first; `generate` warns of it at every call.
        warnings.filterwarnings("ignore", message=".*never trained", category=KeepsightWarning)
        # A policy in training loops at first; the settings and the metrics tell how often it invokes.
        warnings.filterwarnings("ignore", message="An invocation loop", category=KeepsightWarning)
        out = model.generate(
            **inputs,
            memory=policy,
            rollout=options,
            num_return_sequences=1,
            max_new_tokens=room,
            min_new_tokens=0,
            stopping_criteria=StoppingCriteriaList([WordLimit(tokens, length, words)]),
            suppress_tokens=list(branch.backbone.visual_token_ids()),
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            pad_token_id=pad,
            return_dict_in_generate=True,
        )
    admits = torch.tensor([policy.admits(kind) for kind in TYPES])
    result = []
    for row, ids in enumerate(out.sequences[:, length:]):
        places = out.sampled[row].nonzero()
        end = int(places[-1]) + 1 if len(places) else len(ids)
        invocations = [dataclasses.replace(i, position=i.position - length) for i in out.invocations[row]]
        chosen, admitted = out.sampled[row, :end], out.allowed[row, :end] & admits
        result.append(Trajectory(first + row // options.copies, ids[:end], chosen, admitted, invocations))
    trajectories = result[: len(prompts) * options.copies]
    for row, shadow in zip(out.shadowed, result[len(trajectories) :], strict=True):
        trajectories[row] = dataclasses.replace(trajectories[row], without=_branched(trajectories[row], shadow))
    return trajectories


def _branched(trajectory: Trajectory, shadow: Trajectory) -> Trajectory:
    """A shadow's text; up to the memory that it lacks, it is the trajectory's and was not chosen again."""
    chosen = shadow.chosen.clone()
    chosen[: trajectory.invocations[0].position] = False
    admitted = torch.zeros_like(shadow.admitted)
    return dataclasses.replace(shadow, prompt=trajectory.prompt, chosen=chosen, admitted=admitted)


def counterfactuals(
    model: Any,
    prompts: Sequence[Prompt],
    trajectories: Sequence[Trajectory],
    seeds: Sequence[int],
    kind: Counterfactual,
    *,
    max_words: int,
    max_invocations: int | None = None,
    temperature: float = 1.0,
    rows_per_call: int | None = None,
) -> list[Trajectory]:
    """For every trajectory: the same beginning up to its first invocation, and then another continuation.

    A trajectory that invoked nothing is its own counterfactual and costs nothing.

    Args:
        model: carries VisMem.
        prompts: as the trajectories were written after.
        trajectories: each with a memory or without.
        seeds: one per trajectory, for the new continuations.
        kind: "without": no memory from there on. "other": the first memory is of the other type, under that type's
            token; from there on the model invokes as it likes. (A trajectory whose prompt has no image is its own
            counterfactual where the other type is the short-term memory, which needs one.)
        max_words: as in `sample`.
        max_invocations: as the trajectories' policy has it.
        temperature: as in `sample`.
        rows_per_call: as in `sample`.
    """
    tokens = VisMemBranch.of(model).tokens
    policy = {"without": NO_MEMORY, "other": MemoryPolicy("free", max_invocations=max_invocations)}[kind]
    where, replays = [], []
    for index, trajectory in enumerate(trajectories):
        if not trajectory.invoked:
            continue
        first = trajectory.invocations[0]
        if kind == "other" and first.kind == LONG and first.formation.sight.patches is None:
            continue
        where.append(index)
        beginning = trajectory.ids[: first.position]
        if kind == "other":
            invoke = tokens.invoke[LONG if first.kind == SHORT else SHORT]
            beginning = torch.cat([beginning, beginning.new_tensor([invoke])])
        replays.append(Replay(beginning))
    result = list(trajectories)
    if where:
        written = sample(
            model,
            [prompts[trajectories[i].prompt] for i in where],
            [seeds[i] for i in where],
            policy,
            max_words=max_words,
            temperature=temperature,
            rows_per_call=rows_per_call,
            replays=replays,
        )
        for index, trajectory in zip(where, written, strict=True):
            result[index] = dataclasses.replace(trajectory, prompt=trajectories[index].prompt)
    return result


def texts(model: Any, processor: Any, trajectories: Sequence[Trajectory]) -> list[str]:
    """What stands in the trajectories, without memories and special tokens."""
    tokens = VisMemBranch.of(model).tokens
    tokenizer = getattr(processor, "tokenizer", processor)
    rows = [t.ids[~tokens.memory_mask(t.ids)].tolist() for t in trajectories]
    return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
