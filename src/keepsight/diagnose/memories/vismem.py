"""VisMem through the diagnosis' interface: memories are formed at the same places of the same text in every reading.

A latent memory is there only where it was invoked, and what it holds depends on the text before it. So a text is read
in two stages: each memory is formed from one reading of everything before it, exactly as generation forms it; then the
whole text is read once with all latents in place. Other contents take the first stage's place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from keepsight.backbone import Backbone
from keepsight.diagnose.memories.interface import Inputs, Memory, Placed, Plan
from keepsight.diagnose.memories.invoked import active_latent_memory, forced
from keepsight.diagnose.memories.tampering import Contents
from keepsight.peft_method import memory_off
from keepsight.vismem import MemoryPolicy, splice
from keepsight.vismem import scope as vismem_scope
from keepsight.vismem.memory import Formation, Sight, read_sights
from keepsight.vismem.tokens import LONG, SHORT, TYPES

if TYPE_CHECKING:
    from keepsight.diagnose.reader import Reader

REACH = 64  # text tokens after which a further scored answer gets a memory of its own


class VisMemHandle(Memory):
    """VisMem through the interface (see `keepsight.diagnose.memories.interface.Memory`).

    Args:
        model: a model with an active VisMem.
        seed: of policies that invoke at random.
        kind: "short" or "long": which memory is formed where a text is only read; "auto" takes what the model would
            choose itself if its invocation tokens were trained, else the type that was trained.

    Attributes:
        trained: the types whose former was ever trained.
        chooses: the invocation tokens were trained, so that the model's own choice means something.
    """

    method = "VisMem"
    depends_on_text = True
    always_on = False

    def __init__(self, model: Any, seed: int = 0, kind: str = "auto"):
        branch = active_latent_memory(model)
        assert branch is not None, "this model carries no VisMem that is switched on"
        self.model, self.branch, self.seed, self.kind = model, branch, seed, kind
        self.backbone, self.config = Backbone.of(model), branch.config
        self.sizes = {SHORT: self.config.num_short, LONG: self.config.num_long}
        self.tokens = branch.tokens
        memory = branch.active
        banks = ((SHORT, memory.short_bank), (LONG, memory.long_bank))
        self.trained = tuple(name for name, bank in banks if not bank.is_untrained)
        self.chooses = not memory.rows.is_untrained

    @property
    def policy(self) -> MemoryPolicy:
        """The adapter's own policy; while its invocation tokens are untrained, "free" would be chance, and memories
        come at random after delimiters, as stage I invokes them."""
        name = self.config.policy
        if name == "forced" or (not self.chooses and MemoryPolicy(name).model_decides):
            name = "random" if self.config.delimiter_ids else "off"
        return MemoryPolicy(name)

    def off(self) -> AbstractContextManager[Any]:
        """See `Memory.off`."""
        return memory_off(self.branch)

    def single_types(self) -> dict[str, Memory]:
        """See `Memory.single_types`; a handle that was made for one type has none."""
        if self.kind != "auto" or len(self.trained) < 2:
            return {}
        return {kind: VisMemHandle(self.model, self.seed, kind) for kind in TYPES}

    def writing_options(self) -> dict[str, Any]:
        """See `Memory.writing_options`."""
        return {"memory": self.policy, "seed": self.seed}

    def notes(self) -> list[str]:
        """See `Memory.notes`."""
        notes = [] if self.trained else ["This VisMem was never trained: its memories are noise."]
        if self.config.policy == "free" and not self.chooses:
            notes.append(
                "Its invocation tokens were never trained, so what the model would choose is chance. "
                + (
                    "Outputs are written with memories at random places after delimiters; where a text is only read, "
                    "memories stand where they are most needed."
                    if self.policy.name == "random"
                    else "Outputs are written without memories, because its delimiters are unknown (add_memory_tokens)."
                )
            )
        return notes

    # -- where memories stand -------------------------------------------------------------------------------------
    def plan(self, reader: Reader, inputs: Inputs, text: torch.Tensor, scored: Sequence[tuple[int, int]]) -> Plan:
        """At the last delimiter before what is scored; in a text scored as a whole, at its beginning and middle."""
        places = self._places(text, scored)
        kinds = self._kinds(reader, inputs, text, places)
        return tuple(zip(places, kinds, strict=True))

    def _places(self, text: torch.Tensor, scored: Sequence[tuple[int, int]]) -> list[int]:
        delimiters = set(self.config.delimiter_ids or ())
        ends = [0] + [i + 1 for i, token in enumerate(text.tolist()[:-1]) if token in delimiters]
        if list(scored) == [(0, len(text))]:
            middle = len(text) // 2
            return sorted({0, next((end for end in ends if middle <= end < middle + 8), middle)})
        places: list[int] = []
        for start, _ in sorted(scored):
            if not places or start - places[-1] > REACH:
                places.append(max(end for end in ends if end <= start))
        return sorted(set(places))[: self.config.max_invocations]

    def _kinds(self, reader: Reader, inputs: Inputs, text: torch.Tensor, places: list[int]) -> list[str]:
        if not self._sees(inputs):
            return [LONG] * len(places)
        if self.kind in TYPES:
            return [self.kind] * len(places)
        if len(self.trained) == 1:
            return [self.trained[0]] * len(places)
        if not self.chooses or not places:
            first = int(text.sum())  # either type as often over many texts, and always the same for one
            return [TYPES[(first + i) % 2] for i in range(len(places))]
        logits = reader.logits(inputs, text)[torch.tensor(places)]
        own = logits[:, [self.tokens.invoke[kind] for kind in TYPES]].argmax(-1)
        return [TYPES[int(i)] for i in own]

    def _sees(self, inputs: Inputs) -> bool:
        return bool(self.backbone.given_modalities(inputs)) and bool(
            self.backbone.visual_mask(inputs["input_ids"]).any()
        )

    def other_type(self, plan: Plan) -> Plan | None:
        """See `Memory.other_type`."""
        return tuple((place, LONG if kind == SHORT else SHORT) for place, kind in plan)

    def place(self, text: torch.Tensor, plan: Plan) -> Placed:
        """Put the memories of a plan into a text."""
        pieces: list[torch.Tensor] = []
        slots: list[torch.Tensor] = []
        starts: list[int] = []
        at = done = 0

        def words(until: int) -> None:
            nonlocal at, done
            pieces.append(text[done:until])
            slots.append(torch.arange(at, at + until - done))
            at, done = at + until - done, until

        for place, kind in plan:
            words(place)
            starts.append(at)
            pieces.append(torch.tensor([self.tokens.invoke[kind]] + [self.tokens.end[kind]] * (self.sizes[kind] + 1)))
            at += self.sizes[kind] + 2
        words(len(text))
        return Placed(torch.cat(pieces), torch.cat(slots), tuple(starts))

    # -- reading --------------------------------------------------------------------------------------------------
    def contents(self, reader: Reader, inputs: Inputs, text: torch.Tensor, plan: Plan) -> Contents:
        """The latents [1, N, D] of each memory, formed one after the other."""
        return [latents for _, latents in self.formed(reader, inputs, text, plan)]

    @torch.no_grad()
    def formed(
        self, reader: Reader, inputs: Inputs, text: torch.Tensor, plan: Plan
    ) -> list[tuple[Formation, torch.Tensor]]:
        """What each memory of a plan is formed from, and its latents [1, N, D]."""
        placed = self.place(text, plan)
        prompt = inputs["input_ids"].shape[1]
        found: list[tuple[Formation, torch.Tensor]] = []
        sight: Sight | None = None
        since = 0  # H restarts after each memory
        for (_, kind), start in zip(plan, placed.starts, strict=True):
            longer = reader.with_text(inputs, placed.ids[: start + 1])
            with vismem_scope.watching() as watch, self._spliced(longer, [latents for _, latents in found]):
                self.model(**longer, use_cache=False, logits_to_keep=1)
            assert watch.hidden is not None
            whole = watch.embedded if self.branch.config.long_input == "tokens" else None
            if sight is None:
                hidden = watch.hidden[:, :prompt]
                embedded = None if whole is None else whole[:, :prompt]
                sight = read_sights(
                    self.backbone, watch.vision_calls, inputs["input_ids"], hidden, inputs, embedded=embedded
                )[0]
            tokens = None if whole is None else whole[0, prompt:]
            formation = Formation(sight, watch.hidden[0, prompt + since :], tokens)
            latents = self.branch.formers().form(kind, [formation]).to(watch.hidden.dtype)
            found.append((formation, latents))
            since = start + self.sizes[kind] + 2
        return found

    def _spliced(self, longer: Inputs, contents: Contents) -> AbstractContextManager[Any]:
        width = self.backbone.text_config.hidden_size
        device = longer["input_ids"].device
        parts = [part[0].to(device) for part in contents]
        return splice(self.model, longer["input_ids"], torch.cat(parts) if parts else torch.zeros(0, width).to(device))

    def read(
        self, reader: Reader, inputs: Inputs, text: torch.Tensor, plan: Plan, contents: Contents | None = None
    ) -> torch.Tensor:
        """See `Memory.read`."""
        placed, longer = self.with_memories(reader, inputs, text, plan, contents)
        with longer:
            return reader.log_probabilities(reader.logits(inputs, placed.ids)[placed.slots])

    def with_memories(
        self, reader: Reader, inputs: Inputs, text: torch.Tensor, plan: Plan, contents: Contents | None = None
    ) -> tuple[Placed, AbstractContextManager[Inputs]]:
        """The text with its memories, and a scope in which one forward of prompt and text has the latents in place."""
        if contents is None:
            contents = self.contents(reader, inputs, text, plan)
        placed = self.place(text, plan)
        longer = reader.with_text(inputs, placed.ids)
        return placed, self._entered(longer, contents)

    @contextmanager
    def _entered(self, longer: Inputs, contents: Contents) -> Iterator[Inputs]:
        with self._spliced(longer, contents):
            yield longer

    def read_swapped(
        self, reader: Reader, inputs: Inputs, new: Inputs, text: torch.Tensor, cut: int, plan: Plan
    ) -> torch.Tensor:
        """See `Memory.read_swapped`: memories formed from `cut` on are those of the new image."""
        own = self.contents(reader, inputs, text, plan)
        theirs = self.contents(reader, new, text, plan)
        mixed = [b if place >= cut else a for (place, _), a, b in zip(plan, own, theirs, strict=True)]
        return self.read(reader, inputs, text, plan, mixed)[cut:]

    # -- writing --------------------------------------------------------------------------------------------------
    def write(
        self, reader: Reader, inputs: Inputs, steps: int, plan: Plan | None = None, contents: Contents | None = None
    ) -> tuple[torch.Tensor, Plan]:
        """See `Memory.write`."""
        policy = self.policy if plan is None else forced(plan)
        output = reader.output(inputs, steps, memory=policy, seed=self.seed, contents=contents)
        return output.text, output.plan
