"""Makes the eye, stage by stage: fetched packages in, a Qwen2.5-VL out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from studies.eye.drawings.pictures import Pictures
from studies.eye.language import with_eye, word_embeddings
from studies.eye.making import windows
from studies.eye.making.align import Alignment
from studies.eye.making.pretrain import Pretraining
from studies.eye.making.recall import Recall
from studies.eye.making.stages import Stage
from studies.eye.publishing.eye import write
from studies.eye.sizes import OF_ALIGNING, OF_RECALLING, OF_RESTYLING, Size


@dataclass
class Made:
    """How far the eye is.

    Args:
        stage: the last one that was worked on.
        step, steps: of that stage.
        cpu_seconds: of each stage so far.
        done: nothing is left to do.
    """

    stage: str
    step: int
    steps: int
    cpu_seconds: dict[str, float]
    done: bool


def make(
    language: Any,
    tokenizer: Any,
    pictures: Pictures,
    texts: list[list[int]],
    size: Size,
    folder: Path,
    stop: Callable[[], bool],
    device: str = "cpu",
    on_progress: Callable[[str, int, int, float], Any] = lambda *_: None,
    workers: int = 0,
) -> Made:
    """Go on making the eye until it is done or `stop()`; call again to go on.

    Args:
        language, tokenizer: the language model.
        pictures: all drawings.
        texts: tokens of each text that the language is kept by.
        size: what to make.
        folder: of the checkpoints and, whenever stage (b) or (c) is left, of `eye.safetensors`.
        stop: asked before every step whether to leave it at that for now.
        device: "cpu" or "cuda".
        on_progress: called with stage, step, steps and the mean loss of the last steps.
        workers: processes that draw batches ahead; 0 draws them here.
    """
    torch.manual_seed(size.seed)
    model = with_eye(language, tokenizer, size).to(device)
    windows.use(model.model.visual)
    others = sorted(set(pictures.names) - set(pictures.concepts)) if size.others else []
    names = [*pictures.concepts, *others]
    words = word_embeddings(language, tokenizer, names)
    said = partial(word_embeddings, language, tokenizer)
    learner = Pretraining(model.model.visual, pictures, words, names, size, said).to(device)
    weights = {name: (value, 1.0) for name, value in learner.named_parameters()}
    matrices = [name for name, (value, _) in weights.items() if ".blocks." in name and value.ndim == 2]
    spent: dict[str, float] = {}

    def worked(stage: Stage, batch_of: Any, loss_of: Any) -> bool:
        if not stage.done:
            stage.run(batch_of, loss_of, stop, on_progress, workers)
        spent[stage.name] = stage.cpu_seconds
        return stage.done

    for name, steps, bold, own in (
        ("pretrain", size.pretrain_steps, False, size.settings(*OF_ALIGNING, *OF_RECALLING, *OF_RESTYLING)),
        ("restyle", size.restyle_steps, True, size.settings(*OF_ALIGNING, *OF_RECALLING)),
    ):
        stage = Stage(name, folder, weights, steps, size.pretrain_lr, own, matrices, size.muon_lr)
        if not worked(stage, partial(learner.batch, bold=bold), learner.loss):
            return Made(stage.name, stage.step, stage.steps, spent, False)
    alignment = Alignment(model, tokenizer, pictures, size)
    learnt = alignment.parameters()
    stage = Stage("align", folder, learnt, size.align_steps, size.align_lr, size.settings(*OF_RECALLING))
    done = worked(stage, alignment.batch, alignment.loss)
    if done and size.lora and size.recall_steps:
        recall = Recall(alignment, texts)
        stage = Stage("recall", folder, learnt, size.recall_steps, size.recall_lr, size.settings())
        done = worked(stage, recall.batch, recall.loss)
    write(model, size, pictures.concepts, spent, done, folder)
    return Made(stage.name, stage.step, stage.steps, spent, done)
