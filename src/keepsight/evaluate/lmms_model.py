"""The class that lmms-eval drives: conversations with images and videos in, answers out, invocations noted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms

from keepsight.checkpoints.load import load
from keepsight.data.images import open_image
from keepsight.errors import KeepsightError
from keepsight.evaluate.answering import Answer, Answerer, Question
from keepsight.evaluate.settings import EvalSettings

ARGUMENTS = (
    "pretrained, base, memory, dtype, batch_size, device, max_new_tokens, max_frames, system_prompt, invocations"
)
#: What tasks ask `generate` for, and what is done about it: taken over, or known and without effect on us.
TAKEN = ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty", "num_beams")
IDLE = ("image_aspect_ratio", "max_new_tokens", "until")


class KeepsightModel(lmms):
    """A VLM, its memory on, off, or invoked by a policy.

    Args:
        pretrained: an adapter (its base is found by itself) or a plain VLM: a folder or a hub id.
        base: the base model, where it is not the one that the adapter recorded.
        memory: on, off, or a policy of a VisMem: free, only_short, only_long, random, reversed.
        dtype: as in `keepsight.load`.
        batch_size: questions at a time.
        device: as in `keepsight.load`; default: the GPU if there is one.
        max_new_tokens: of tasks that name no limit.
        max_frames: of a video, evenly spread.
        system_prompt: put before every conversation.
        invocations: a JSONL file that gets a line per answer: task, document, tokens, and where which memory was
            invoked. Default: none is written.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "keepsight/reference",
        base: str | None = None,
        memory: str = "on",
        dtype: str = "auto",
        batch_size: int | str | None = 1,
        device: str | None = None,
        max_new_tokens: int = EvalSettings.max_new_tokens,
        max_frames: int = 32,
        system_prompt: str = "",
        invocations: str | None = None,
        max_batch_size: Any = None,
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            raise KeepsightError(f"model_args {', '.join(sorted(unknown))}: unknown. Known are {ARGUMENTS}.")
        if not str(batch_size or 1).isdigit() or int(batch_size or 1) < 1:
            raise KeepsightError(f"batch_size={batch_size}: expected a number from 1; it is not found by itself.")
        # lmms-eval reads true, false and numbers out of its argument string
        memory = {True: "on", False: "off"}.get(memory, memory) if isinstance(memory, bool) else memory
        model, self.processor = load(pretrained, base=base, dtype=dtype, device=device)
        self.model = model.eval()
        self.answerer = Answerer(self.model, self.processor, str(memory))
        self.batch_size_per_gpu = int(batch_size or 1)
        self.max_new_tokens, self.max_frames, self.system_prompt = int(max_new_tokens), int(max_frames), system_prompt
        self.log = None if invocations is None else Path(invocations)
        if self.log is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            self.log.write_text("")

    @property
    def batch_size(self) -> int:
        """Questions at a time."""
        return self.batch_size_per_gpu

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """One answer per request, in their order; requests that ask alike share batches."""
        results: list[Any] = [None] * len(requests)
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[2], sort_keys=True, default=str), []).append(place)
        for places in groups.values():
            asked = dict(requests[places[0]].args[2] or {})
            options, limit, until = self._options(asked)
            for start in range(0, len(places), self.batch_size):
                batch = places[start : start + self.batch_size]
                questions = [self._question(requests[place]) for place in batch]
                for place, answer in zip(batch, self.answerer.answers(questions, limit, **options), strict=True):
                    text = _cut(answer.text, until)
                    results[place] = GenerationResult(text, TokenCounts(answer.prompt_tokens, answer.tokens))
                    self.cache_hook.add_partial("generate_until", (requests[place].args[0], asked), text)
                    self._note(requests[place], answer)
        return results

    def _options(self, asked: dict[str, Any]) -> tuple[dict[str, Any], int, list[str]]:
        """What a task asks of `generate`: (options, the longest answer, what ends it)."""
        unknown = sorted(set(asked) - {*TAKEN, *IDLE})
        if unknown:
            raise KeepsightError(f"The task's generation_kwargs hold {', '.join(unknown)}, which is not known here.")
        options = {name: asked[name] for name in TAKEN if asked.get(name) is not None}
        if not options.get("temperature", 1) or not options.get("do_sample", "temperature" in options):
            options = {name: options[name] for name in ("repetition_penalty", "num_beams") if name in options}
            options["do_sample"] = False
        else:
            options["do_sample"] = True
        until = asked.get("until") or []
        limit = int(asked.get("max_new_tokens") or self.max_new_tokens)
        # a blank line would end every reasoned answer; lmms-eval's own models leave it out as well
        return options, limit, [one for one in ([until] if isinstance(until, str) else until) if one.strip()]

    def _question(self, request: Any) -> Question:
        _, doc_to_messages, _, doc_id, task, split = request.args
        given = doc_to_messages(self.task_dict[task][split][doc_id])
        messages: list[dict[str, Any]] = []
        if self.system_prompt:
            messages.append({"role": "system", "content": [{"type": "text", "text": self.system_prompt}]})
        images, videos = [], []
        for message in given:
            parts: list[dict[str, Any]] = []
            for part in message["content"]:
                if part["type"] == "text":
                    parts.append({"type": "text", "text": part["text"]})
                    continue
                parts.append({"type": part["type"]})
                if part["type"] == "image":
                    images.append(open_image(part["url"]))
                elif part["type"] == "video":
                    videos.append(_frames(part["url"], self.max_frames))
                else:
                    raise KeepsightError(f"Task {task} holds {part['type']}, which this model cannot take.")
            messages.append({"role": message["role"], "content": parts})
        return Question(messages, tuple(images), tuple(videos))

    def _note(self, request: Any, answer: Answer) -> None:
        if self.log is None:
            return
        _, _, _, doc_id, task, _ = request.args
        places = [{"type": kind, "after_tokens": after} for kind, after in answer.invocations]
        with self.log.open("a") as file:
            line = {"task": task, "doc_id": doc_id, "tokens": answer.tokens, "invocations": places}
            file.write(json.dumps(line) + "\n")

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not offered: a VisMem writes while it answers, and likelihoods of given texts would leave that out."""
        raise KeepsightError("Tasks that compare likelihoods of given answers are not supported; take generative ones.")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        """Not offered."""
        raise KeepsightError("Tasks of several rounds are not supported.")


def _cut(text: str, until: Iterable[str]) -> str:
    for end in until:
        text = text.partition(end)[0]
    return text.strip()


def _frames(video: Any, most: int) -> np.ndarray:
    """Up to `most` frames [F, H, W, 3] uint8, evenly spread, of a video file or a sequence of images."""
    if isinstance(video, (str, Path)):
        import av  # lmms-eval brings it

        with av.open(str(video)) as opened:
            frames = [frame.to_ndarray(format="rgb24") for frame in opened.decode(video=0)]
    else:
        frames = [np.asarray(open_image(frame)) for frame in video]
    if not frames:
        raise KeepsightError(f"The video {video!r} holds no frame.")
    chosen = np.linspace(0, len(frames) - 1, min(most, len(frames))).round().astype(int)
    return np.stack([frames[i] for i in chosen])
