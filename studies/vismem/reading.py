"""VisMem in the lab: narrations read piece by piece, with memories formed and spliced in between.

A `Reading` feeds a batch of narrations through the frozen language model with its KV cache. At any place it can go on
without memory, with a memory of its own, or with anything else of the same shape (another image's memory, noise, the
image's visual embeddings): `mark` and `rewind` make every alternative cost only what comes after it. All rows of a
batch share one layout and one plan, so nothing is padded. It computes what `model.generate` computes for the same
tokens (a test compares the two); the given digits are fed on, whatever the model would have said, as everywhere in the
lab.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model

from keepsight.backbone import Backbone
from keepsight.compat import cache_argument, find_output_cache
from keepsight.lab.evaluation import SCORED
from keepsight.lab.narration import Narrations
from keepsight.vismem import VisMemBranch, VisMemConfig, add_memory_tokens
from keepsight.vismem import scope as vismem_scope
from keepsight.vismem.embeddings import watch_visual_embeddings
from keepsight.vismem.memory import Formation, Sight, read_sights
from keepsight.vismem.module import match_rms
from studies.tasks.tasks import TaskBatch

MAX_TEXT_STATES = 8
"""Text states in H. Without a cap the long-term former drifts with the text (docs/vismem.md)."""


def lab_config(**changes: Any) -> VisMemConfig:
    """VisMem for the reference VLM: as many latents as the image has cells, a query builder of width 64.

    Not the paper's: `max_text_states` (see above), the grid layout of the short-term memory's positions, head rows of
    their own (the reference VLM ties them), and no dropout.
    """
    sizes: dict[str, Any] = {
        "num_queries": 8,
        "num_short": 16,
        "num_long": 16,
        "query_width": 64,
        "query_heads": 4,
        "short_dropout": 0.0,
        "long_dropout": 0.0,
        "slot_layout": "grid",
        "max_text_states": MAX_TEXT_STATES,
        "untied_rows": True,
        "delimiters": ["."],
    }
    return VisMemConfig(**(sizes | changes))


def attach_vismem(model: Any, processor: Any, seed: int, config: VisMemConfig | None = None) -> Any:
    """Put an untrained VisMem on a frozen base, through `peft.get_peft_model`, and its tokens into the processor."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2000 + seed)
        model = get_peft_model(model, config or lab_config())
        add_memory_tokens(processor, model)
    return model.eval()


@dataclass(frozen=True)
class Place:
    """A place in a reading to come back to."""

    states: list[tuple[torch.Tensor, torch.Tensor]]
    column: int
    length: int
    text: torch.Tensor
    inputs: torch.Tensor
    last: torch.Tensor


class Reading:
    """A batch of narrations while it is read.

    Args:
        model: a reference VLM that carries VisMem.
        batch: the narrations.
        column: how many columns of `batch.input_ids` to read at once; at least the prompt.

    Attributes:
        sights: what each row sees.
        embeddings: the images' visual embeddings [B, M, D], as they enter the language model.
        column: columns read so far.
        text: text states since the last memory [B, Z, D].
        inputs: input embeddings since the prompt [B, n, D].
        last: the last state [B, D].
    """

    def __init__(self, model: Any, batch: Narrations | TaskBatch, column: int | None = None):
        self.model, self.batch = model, batch
        self.backbone = Backbone.of(model)
        self.branch = VisMemBranch.of(model)
        self.tokens = self.branch.tokens
        self.column = batch.start if column is None else column
        assert self.column >= batch.start, "the prompt is read in one piece"
        ids = batch.input_ids[:, : self.column]
        inputs = batch.model_inputs() | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs["mm_token_type_ids"] = inputs["mm_token_type_ids"][:, : self.column]
        with torch.no_grad(), vismem_scope.watching() as watch, watch_visual_embeddings(self.backbone) as seen:
            output = self.backbone.vlm(**inputs, use_cache=True)
            embedded = watch.embedded
            self.sights: list[Sight] = read_sights(
                self.backbone, watch.vision_calls, ids, output[0], inputs, embedded=embedded
            )
        self.embeddings = torch.stack(seen.rows(ids))
        self._cache: Any = find_output_cache(output)
        places, _ = self.backbone.vlm.get_rope_index(
            input_ids=ids,
            mm_token_type_ids=inputs["mm_token_type_ids"],
            image_grid_thw=inputs["image_grid_thw"],
        )
        self._offset = int(places.max()) + 1 - self.column  # a text position is its index plus this
        self._length = self.column
        self.text = output[0][:, batch.start :].detach()
        assert embedded is not None
        for sight, prompt in zip(self.sights, embedded, strict=True):
            sight.prompt = prompt[: batch.start].detach()
        self.inputs = embedded[:, batch.start :].detach()
        self.last = output[0][:, -1]

    # Going on

    def feed(self, column: int) -> torch.Tensor:
        """Read up to `column` (exclusive); returns the new states [B, n, D]."""
        ids = self.batch.input_ids[:, self.column : column]
        self.column = column
        states = self._run(self.backbone.model.get_input_embeddings()(ids))
        self.text = torch.cat([self.text, states], 1)
        return states

    def invoke(self, kind: str) -> None:
        """Write the invocation token of "short" or "long"."""
        states = self._run(self._token(self.tokens.invoke[kind]))
        self.text = torch.cat([self.text, states], 1)

    def form(self, kind: str) -> torch.Tensor:
        """The memory of each row, as things stand: [B, N, D], with gradients where they are enabled."""
        limit = self.branch.config.max_text_states
        text = self.text.detach() if limit is None else self.text[:, -limit:].detach()
        rows = zip(self.sights, text, self.inputs, strict=True)
        formations = [Formation(sight, states, tokens) for sight, states, tokens in rows]
        return self.branch.formers().form(kind, formations)

    def splice(self, kind: str, latents: torch.Tensor) -> None:
        """Feed latents [B, N, D] and the end token; H starts anew."""
        self._run(torch.cat([latents.to(self.text.dtype), self._token(self.tokens.end[kind])], 1))
        self.text = self.text[:, :0]

    def remember(self, kind: str) -> None:
        """Invoke, form and splice in one."""
        self.invoke(kind)
        self.splice(kind, self.form(kind))

    def write(
        self, count: int, temperature: float, generator: torch.Generator, banned: tuple[int, ...] = ()
    ) -> torch.Tensor:
        """Write `count` words freely, in place of the batch's text: ids [B, count]."""
        written = []
        for _ in range(count):
            logits = self.logits(self.last)
            logits[:, list(banned)] = -torch.inf
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            written.append(chosen)
            self.text = torch.cat([self.text, self._run(self.backbone.model.get_input_embeddings()(chosen))], 1)
        return torch.cat(written, 1)

    def predict(self, answers: torch.Tensor) -> torch.Tensor:
        """Read through the last of `answers` (columns of digits); the base's logits [B, len(answers), V] for them."""
        first = self.column
        states = torch.cat([self.last[:, None], self.feed(int(answers[-1]))], 1)  # at columns first - 1 and on
        return self.logits(states[:, answers - first])

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """The base's logits of states [..., D]: words only, no invocation."""
        return self.backbone.model.get_output_embeddings()(states)[..., : self.backbone.text_config.vocab_size]

    # Going back

    def mark(self) -> Place:
        """Where the reading is."""
        states = [(layer.keys, layer.values) for layer in self._cache.layers]
        return Place(states, self.column, self._length, self.text, self.inputs, self.last)

    def rewind(self, mark: Place) -> None:
        """Go back to a mark. Updates of the cache make new tensors, so the old ones are still what they were."""
        for layer, (keys, values) in zip(self._cache.layers, mark.states, strict=True):
            layer.keys, layer.values = keys, values
        self.column, self._length, self.last = mark.column, mark.length, mark.last
        self.text, self.inputs = mark.text, mark.inputs

    def _token(self, index: int) -> torch.Tensor:
        ids = torch.full((len(self.sights), 1), index)
        return self.backbone.model.get_input_embeddings()(ids)

    def _run(self, embeddings: torch.Tensor) -> torch.Tensor:
        rows, count = embeddings.shape[:2]
        self.inputs = torch.cat([self.inputs, embeddings.detach()], 1)
        places = torch.arange(self._length, self._length + count) + self._offset
        self._length += count
        output = self.backbone.decoder(
            inputs_embeds=embeddings,
            attention_mask=torch.ones(rows, self._length, dtype=torch.long),
            position_ids=places.expand(3, rows, count),
            use_cache=True,
            **cache_argument(self.backbone.decoder, self._cache),
        )
        self.last = output.last_hidden_state[:, -1]
        return output.last_hidden_state


def decision_column(batch: Narrations, scored: int = SCORED) -> int:
    """The column behind the full stop before the first scored fact: where one memory serves all scored answers."""
    return int(batch.answers[-scored - 1]) + 2


def answers_with_plan(reading: Reading, plan: Mapping[int, str], scored: int = SCORED) -> torch.Tensor:
    """The most probable tokens [B, scored] at the last answers, with memories after some facts.

    Args:
        reading: a reading at the end of the prompt.
        plan: number of facts told -> type of the memory that follows the full stop behind the last of them.
        scored: how many answers.
    """
    batch, found = reading.batch, []
    for fact, answer in enumerate(batch.answers.tolist()):
        if fact in plan:
            if fact:
                reading.feed(int(batch.answers[fact - 1]) + 2)
            reading.remember(plan[fact])
        if fact >= len(batch.answers) - scored:
            found.append(reading.predict(torch.tensor([answer]))[:, 0].argmax(-1))
    return torch.stack(found, 1)


def noise_like(latents: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Gaussian vectors, each of the root mean square of the latent in its place."""
    drawn = torch.randn(latents.shape, generator=generator)
    return match_rms(drawn, latents.float().square().mean(-1, keepdim=True).sqrt()).to(latents.dtype)
