"""Probe the latents of a memory: spread, nearest words and images, linear maps (VisMem; the paper leaves it open).

Memories of one type are formed for many images after the same text, so that only the image differs, and their latents
are looked at from four sides:

- **do they differ at all?** Their spread across images, against that of the visual states that they are formed from.
  Latents of other methods were found to be near-constant, and then no probe of them means anything.
- **which words and which pictures are nearest?** Rows of the embedding table, with random vectors as the control; and
  the image's own visual embeddings, with another image's as the control.
- **what can a linear map read?** Facts of a task that knows them (the lab's: which digit stands where), with shuffled
  labels as the control, and the same map from visual states and from text states for comparison.
- **where do they look while they are formed?** See `forming.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from keepsight.diagnose.battery.linear import linear_probe, shuffled
from keepsight.diagnose.battery.probe_results import Fact, LatentProbe
from keepsight.diagnose.cases import Sample, stand_in_images
from keepsight.diagnose.instruments.forming import watch_forming
from keepsight.diagnose.instruments.layout import VisualLayout
from keepsight.diagnose.instruments.watching import GenerationWatch
from keepsight.diagnose.memories.vismem import VisMemHandle
from keepsight.diagnose.reader import Reader
from keepsight.diagnose.statistics import estimate
from keepsight.diagnose.task import KnownTask
from keepsight.vismem import scope as vismem_scope
from keepsight.vismem.embeddings import watch_visual_embeddings
from keepsight.vismem.memory import Formation, read_sights
from keepsight.vismem.tokens import SHORT, TYPES

BATCH = 32
TEST_SHARE = 4  # one image in four is for testing
WORDS = 3  # nearest words per latent


@dataclass
class _Collected:
    latents: list[torch.Tensor] = field(default_factory=list)  # [N, D] each
    embeddings: list[torch.Tensor] = field(default_factory=list)  # [M, D] each
    visual: list[torch.Tensor] = field(default_factory=list)  # [M, D] each
    text: list[torch.Tensor] = field(default_factory=list)  # [D] each
    facts: list[np.ndarray] = field(default_factory=list)  # [Q] each
    first: tuple[Formation, VisualLayout | None] | None = None


class Probe:
    """Collects latents image by image, so that it can be stopped at any time.

    Args:
        reader: the model.
        memory: its latent memory.
        samples: images to form memories of, where there is no task.
        images: so many images of the task (a quarter of them is for testing), or at most so many samples.
        seed: of images and controls.
        task: a task whose facts are known, in place of samples.
    """

    def __init__(
        self,
        reader: Reader,
        memory: VisMemHandle,
        samples: Sequence[Sample] = (),
        images: int = 512,
        seed: int = 0,
        task: KnownTask | None = None,
    ):
        self.reader, self.memory, self.images, self.seed = reader, memory, images, seed
        self.task = task
        self.samples = [sample for sample in samples if sample.sees][:images]
        if len(self.samples) == 1 and task is None:
            only = self.samples[0]
            stand_ins = stand_in_images(only.images, 7, seed)
            self.samples += [replace(only, images=tuple(i)) for i in stand_ins] if only.images else []
        self._found: dict[str, _Collected] = {}

    def __len__(self) -> int:
        return -(-self.images // BATCH) if self.task is not None else len(self.samples)

    def run(self) -> Iterator[int]:
        """Collect; yields the number of finished batches (lab) or samples."""
        for done in range(len(self)):
            if self.task is not None:
                self._batch(self.task, done)
            else:
                sample = self.samples[done]
                self._take(self.reader.inputs(sample), torch.zeros(0, dtype=torch.long), None)
            yield done + 1

    def _batch(self, task: KnownTask, number: int) -> None:
        # testing comes first: all of it on images that no probe and no memory was trained on
        test = number < max(1, len(self) // TEST_SHARE)
        batch = task.images(min(BATCH, self.images - number * BATCH), test, [self.seed, number, 77])
        device = self.reader.model.device
        self._take({name: value.to(device) for name, value in batch.inputs.items()}, batch.text, batch.facts)

    @torch.no_grad()
    def _take(self, inputs: dict[str, torch.Tensor], text: torch.Tensor, facts: np.ndarray | None) -> None:
        """Form memories of both types for every row, after the same number of words."""
        memory, backbone = self.memory, self.memory.backbone
        prompt, rows = inputs["input_ids"].shape[1], len(inputs["input_ids"])
        text = text.expand(rows, -1) if text.ndim == 1 else text
        for kind in TYPES:
            invoke = torch.full((rows, 1), memory.tokens.invoke[kind])
            longer = self.reader.with_text(inputs, torch.cat([text, invoke], 1))
            watch_layout = GenerationWatch(backbone)
            handles = watch_layout.hooks()
            try:
                with vismem_scope.watching() as watch, watch_visual_embeddings(backbone) as embedded:
                    self.reader.model(**longer, use_cache=False, logits_to_keep=1)
            finally:
                for handle in handles:
                    handle.remove()
            seen = watch_layout.take()
            hidden = watch.hidden
            assert hidden is not None
            whole = watch.embedded if memory.branch.config.long_input == "tokens" else None
            first = None if whole is None else whole[:, :prompt]
            sights = read_sights(
                backbone, watch.vision_calls, inputs["input_ids"], hidden[:, :prompt], inputs, embedded=first
            )
            if kind == SHORT and any(sight.patches is None for sight in sights):
                continue
            formations = [
                Formation(s, hidden[i, prompt:], None if whole is None else whole[i, prompt:])
                for i, s in enumerate(sights)
            ]
            latents = memory.branch.formers().form(kind, formations).float().cpu()
            found = self._found.setdefault(kind, _Collected())
            embeddings = embedded.rows(longer["input_ids"])
            for row in range(rows):
                found.latents.append(latents[row])
                found.embeddings.append(embeddings[row].float().cpu())
                found.visual.append(sights[row].visual.float().cpu())
                found.text.append(formations[row].text[-1].float().cpu())
                if facts is not None:
                    found.facts.append(facts[row])
            if found.first is None:
                found.first = formations[0], None if seen is None else seen[1][0]

    def result(self) -> list[LatentProbe]:
        """What was found in the images so far, one entry per type."""
        return [self._probe(kind, found) for kind, found in self._found.items()]

    def _probe(self, kind: str, found: _Collected) -> LatentProbe:
        latents = torch.stack(found.latents)  # [n, N, D]
        images = len(latents)
        same_size = len({v.shape for v in found.visual}) == 1
        words, word_cosine, random_cosine = self._nearest_words(latents)
        own = [_nearest(a, b) for a, b in zip(latents, found.embeddings, strict=True) if len(b)]
        other = [
            _nearest(a, found.embeddings[(i + 1) % images])
            for i, a in enumerate(latents)
            if len(found.embeddings[(i + 1) % images])
        ]
        forming = None
        if found.first is not None:
            forming = watch_forming(self.memory.branch.formers(), kind, *found.first)
        return LatentProbe(
            kind=kind,
            images=images,
            trained=kind in self.memory.trained,
            spread=_spread(latents) if images > 2 else None,
            visual_spread=_spread(torch.stack(found.visual)) if images > 2 and same_size else None,
            alike=_alike(latents),
            words=words,
            word_cosine=word_cosine,
            random_cosine=random_cosine,
            image_cosine=float(np.mean(own)) if own else None,
            other_cosine=float(np.mean(other)) if other and images > 1 else None,
            facts=self._facts(self.task, found) if self.task is not None and found.facts and len(self) > 1 else [],
            forming=forming,
        )

    def _nearest_words(self, latents: torch.Tensor) -> tuple[list[list[tuple[str, float]]], float, float]:
        table = self.memory.backbone.model.get_input_embeddings().weight.detach()
        tokenizer = self.reader.processor.tokenizer
        hidden = [i for i in (*tokenizer.all_special_ids, *self.memory.tokens.ids) if i < len(table)]
        known = min(len(table), len(tokenizer))
        table = torch.nn.functional.normalize(table[:known].float().cpu(), dim=-1)
        table[[i for i in hidden if i < known]] = 0

        def best(vectors: torch.Tensor, count: int) -> Any:
            flat = torch.nn.functional.normalize(vectors.flatten(0, -2).float(), dim=-1)
            parts = [(part @ table.T).topk(count) for part in flat.split(256)]
            return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])

        values, indices = best(latents.mean(0), WORDS)
        words = [
            [(tokenizer.decode([int(i)]).strip(), round(float(v), 3)) for v, i in zip(vs, row, strict=True)]
            for vs, row in zip(values, indices, strict=True)
        ]
        few = latents[:64]
        random = torch.randn(few.shape, generator=torch.Generator().manual_seed(self.seed))
        return words, float(best(few, 1)[0].mean()), float(best(random, 1)[0].mean())

    def _facts(self, task: KnownTask, found: _Collected) -> list[Fact]:
        facts = np.stack(found.facts)  # [n, Q]
        features = {
            "latents": torch.stack(found.latents).flatten(1).numpy(),
            "visual": torch.stack(found.visual).flatten(1).numpy(),
            "text": torch.stack(found.text).numpy(),
        }
        tests = max(1, len(self) // TEST_SHARE) * BATCH
        if len(facts) < tests + 2 * BATCH:
            return []
        return [self._fact(name, features, labels, tests) for name, labels in task.questions(facts)]

    def _fact(self, name: str, features: dict[str, np.ndarray], labels: np.ndarray, tests: int) -> Fact:
        """One fact; labels [n, F], -1 where a question cannot be asked of an image."""
        groups = [slice(None)] if labels.min() >= 0 else [slice(q, q + 1) for q in range(labels.shape[1])]
        scores: dict[str, list[np.ndarray]] = {}
        questions: list[float] = []
        majority = []
        for group in groups:
            asked: np.ndarray = np.all(labels[:, group] >= 0, axis=1)
            test, train = asked.copy(), asked.copy()
            test[tests:], train[:tests] = False, False
            y, y_test = labels[train][:, group], labels[test][:, group]
            for kind, x in features.items():
                score = linear_probe(x[train], y, x[test], y_test)
                scores.setdefault(kind, []).append(score.right)
                if kind == "latents":
                    questions += score.right.mean(0).tolist()
                    majority.append(score.majority)
            control = linear_probe(
                features["latents"][train], shuffled(y, self.seed), features["latents"][test], y_test
            )
            scores.setdefault("shuffled", []).append(control.right)
        # one unit per image where all are asked the same, else one per question asked
        found = {
            kind: estimate(rows[0].mean(1) if len(rows) == 1 else np.concatenate([r[:, 0] for r in rows]))
            for kind, rows in scores.items()
        }
        return Fact(
            name,
            int(labels.max()) + 1,
            found["latents"],
            found["shuffled"],
            found["visual"],
            found["text"],
            float(np.mean(majority)),
            np.array(questions),
        )


def _spread(vectors: torch.Tensor) -> float:
    """Variance of [n, N, D] over n as a share of the mean square, mean over N."""
    return float((vectors.var(0, correction=0).sum(-1) / vectors.square().mean(0).sum(-1).clamp(min=1e-12)).mean())


def _alike(latents: torch.Tensor) -> float:
    """Mean cosine between different latents of a memory, [n, N, D]."""
    count = latents.shape[1]
    if count < 2:
        return 1.0
    unit = torch.nn.functional.normalize(latents, dim=-1)
    cosines = unit @ unit.transpose(1, 2)
    return float((cosines.sum((1, 2)) - count).mean() / (count * (count - 1)))


def _nearest(latents: torch.Tensor, embeddings: torch.Tensor) -> float:
    """Mean over latents [N, D] of the largest cosine to embeddings [M, D]."""
    a, b = (torch.nn.functional.normalize(t, dim=-1) for t in (latents, embeddings))
    return float((a @ b.T).amax(1).mean())
