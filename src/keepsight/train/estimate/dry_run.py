"""Dry runs: parameters, memory, tokens and operations of a training run, without reading a weight.

One step is traced on shapes (`tracing.py`), with what is to be learned put on the model as in training.

Not traced: the vision encoder (frozen, it keeps nothing; its operations are counted from its weights), the head (TRL
computes the loss in chunks), allocator overhead and CUDA's own memory (about 1 GiB).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from keepsight.backbone import Backbone
from keepsight.checkpoints.bases import base_config
from keepsight.errors import KeepsightError
from keepsight.train.estimate.needs import DryRun, as_on_gpu, estimate
from keepsight.train.estimate.tracing import meta_model
from keepsight.train.run.engines import Engine, current_engine
from keepsight.train.run.four_bit import packed_weights
from keepsight.train.run.learner import Learner
from keepsight.train.run.settings import GrpoSettings, RunSettings

DEFAULT_TOKENS = 2048


def dry_run(
    source: str | Path,
    learner: Learner,
    settings: RunSettings,
    *,
    length: int = DEFAULT_TOKENS,
    visual: int | None = None,
    what: str = "the memory",
    engine: Engine | None = None,
) -> DryRun:
    """What a run of `train_pvm` or `train_pvm_grpo` would need.

    Args:
        source: the base: a hub id, or a folder that holds at least its config.json.
        learner: what is trained. Adapters are not read: a memory that exists needs what a new one needs.
        settings: of the run (`GrpoSettings` for a run with rollouts). The run is one on a GPU with bfloat16, wherever
            this is called, unless they ask for a CPU.
        length: positions of a sample, images included; of a prompt, where completions are generated.
        visual: how many of them are visual; default: half, at most 1,024.
        what: is trained, in words.
        engine: what shares the work; default: what this process was launched with.

    Raises:
        UnsupportedModelError, FileNotFoundError: if `source` is no base.
    """
    engine = current_engine() if engine is None else engine
    settings = as_on_gpu(settings)
    generated = settings.max_new_tokens if isinstance(settings, GrpoSettings) else 0
    half = settings.uses_bf16 or settings.dtype == "bfloat16"
    model = meta_model(source, torch.bfloat16 if half else torch.float32, settings.attention == "eager")
    packed = packed_weights(Backbone.of(model)) if settings.load_in_4bit else 0
    with torch.device("meta"):
        put = learner.put_on(model, settings.seed)
    visual = min(1024, length // 2) if visual is None else visual
    if not 0 <= visual < length:
        raise KeepsightError(f"{visual} visual tokens do not fit into {length} positions with text beside them.")
    stored = _stored(source, settings, learner, engine)
    return estimate(str(source), put, settings, length, visual, generated, what, engine, stored, packed)


@dataclass(frozen=True)
class MeasuredData:
    """What the data of a run are like.

    Attributes:
        tokens: of the longest of the samples that were looked at.
        visual: how many of them are visual.
        mix: in what shares several datasets would be learned from, if all their samples are good; None for one.
    """

    tokens: int
    visual: int
    mix: str | None = None


def measured(
    source: str | Path, dataset: Any, split: str = "train", answers: bool = True, most: int = 200
) -> MeasuredData:
    """Look at up to `most` samples of each dataset, evenly spaced.

    Args:
        source: the base, with its processor.
        dataset: whatever `load_dataset_any` reads, or several of them (`keepsight.data.mixture.mixture_of`).
        split: of hub datasets.
        answers: measure prompt and answer; otherwise the prompt.
        most: how many samples of each dataset to look at.

    Raises:
        DataError: naming file and line of one that cannot be used.
    """
    from keepsight.checkpoints.load import load_processor
    from keepsight.data.collate import ConversationCollator
    from keepsight.data.conversations import DataError
    from keepsight.data.mixing import epoch_of, in_words
    from keepsight.data.mixture import load_sources
    from keepsight.data.rows import check_images
    from keepsight.data.samples import sample_reader

    collator = ConversationCollator(load_processor(source))
    longest = (0, 0)
    sources, weights = load_sources(dataset, split)
    for data in sources:
        read = sample_reader(data, "chat" if answers else "prompt")
        for index in range(0, len(data.rows), max(1, len(data.rows) // most)):
            try:
                sample = read(data.rows[index]).sample
                images = check_images(sample, data.folders(index), True) or []
            except DataError as error:
                raise DataError(
                    f"{data.name}, {data.where(index)}, {str(error).rstrip('.')}. {error.hint}".rstrip()
                ) from error
            if answers:
                batch = collator([{**sample, "images": images}])
                visual = len(collator.visual_positions(batch["input_ids"][0]))
                longest = max(longest, (batch["input_ids"].shape[1], visual))
            else:
                longest = max(longest, collator.prompt_tokens(sample["messages"], images))
    names, sizes = [data.name for data in sources], [len(data.rows) for data in sources]
    mix = None if len(sources) == 1 else in_words(names, sizes, epoch_of(names, sizes, weights))
    return MeasuredData(*longest, mix)


def _stored(source: str | Path, settings: RunSettings, learner: Learner, engine: Engine) -> int:
    """Bytes of one weight of the base as the run reads it, where it is not packed."""
    if settings.dtype != "auto":
        return {"float32": 4}.get(settings.dtype, 2)
    if learner.policy == "full" and not engine.name.startswith("zero"):
        return 4
    recorded = str(getattr(base_config(source), "dtype", None)).removeprefix("torch.")
    return 2 if recorded in ("bfloat16", "float16") else 4
