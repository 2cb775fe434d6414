"""What a diagnosis is made on: images with a prompt, and what the model is asked to say or has said about them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from keepsight.backbone import Backbone
from keepsight.errors import KeepsightError

#: Asks for a look at the image at every step of a long answer (the paper's "blind painter").
LONG_PROMPT = (
    "A painter who cannot see this picture will paint an exact copy of it from your words alone. Guide the brush "
    "stroke by stroke, from the top left to the bottom right: for every stroke say where it goes, its shape, its "
    "colour and what it belongs to. Look again at the picture before each stroke, never summarise, never repeat "
    "yourself, and do not stop before every corner has been painted."
)


@dataclass(frozen=True)
class Sample:
    """One question about images.

    Attributes:
        prompt: what is asked.
        images: PIL images, in order.
        videos: videos, each uint8 [F, H, W, 3].
        answer: the reference, if there is one.
        reply: how the reply begins; the answer follows it. It makes an answer stand at any length of output.
    """

    prompt: str
    images: tuple[Any, ...] = ()
    videos: tuple[np.ndarray, ...] = ()
    answer: str | None = None
    reply: str = ""

    @property
    def sees(self) -> bool:
        """Whether there is anything to look at."""
        return bool(self.images or self.videos)


@dataclass
class Case:
    """A sample as tensors, with a text that follows the prompt.

    Attributes:
        sample: where it comes from.
        text: [n] token ids after the prompt.
        scored: index into `text` of the first token of each reference answer, and one past its last.
        digits, cells: of the lab's narrations: what each cell holds [16], and which cell each scored answer is about.
    """

    sample: Sample
    text: torch.Tensor
    scored: list[tuple[int, int]] = field(default_factory=list)
    digits: torch.Tensor | None = None
    cells: torch.Tensor | None = None

    def answers_for(self, other: Case) -> list[int] | None:
        """First token of each answer if the image were `other`'s; None if that is not known."""
        if self.digits is not None and self.cells is not None and other.digits is not None:
            from keepsight.lab.narration import DIGITS, TOKEN

            return [int(other.digits[cell]) + TOKEN[DIGITS[0]] for cell in self.cells]
        same = (self.sample.prompt, self.sample.reply) == (other.sample.prompt, other.sample.reply)
        if same and len(self.scored) == len(other.scored) == 1:
            return [int(other.text[other.scored[0][0]])]
        return None


class Reader:
    """A model with its processor: makes inputs, reads texts, writes texts. Batch size 1, so nothing is padded.

    Args:
        model: a supported VLM, with or without adapters.
        processor: its processor.
    """

    def __init__(self, model: Any, processor: Any):
        from keepsight.train.collate import require_chat_template

        require_chat_template(processor)
        self.model, self.processor, self.backbone = model, processor, Backbone.of(model)

    def inputs(self, sample: Sample) -> dict[str, torch.Tensor]:
        """Model inputs of the prompt, one row.

        Raises:
            KeepsightError: if the processor cannot read the images (it says why).
        """
        content: list[dict[str, Any]] = [{"type": "image"} for _ in sample.images]
        content += [{"type": "video"} for _ in sample.videos]
        content.append({"type": "text", "text": sample.prompt})
        prompt = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        given: dict[str, Any] = {"text": [prompt], "add_special_tokens": False, "return_tensors": "pt"}
        if sample.images:
            given["images"] = [list(sample.images)]
        if sample.videos:
            frames = [torch.from_numpy(np.ascontiguousarray(v.transpose(0, 3, 1, 2))) for v in sample.videos]
            given |= {"videos": frames, "do_sample_frames": False}
        try:
            inputs = self.processor(**given)
        except (ValueError, TypeError, RuntimeError, IndexError) as error:
            sizes = [f"{image.width}x{image.height}" for image in sample.images]
            sizes += [f"{v.shape[0]} frames of {v.shape[2]}x{v.shape[1]}" for v in sample.videos]
            raise KeepsightError(
                f"This model's processor ({type(self.processor).__name__}) cannot read {', '.join(sizes) or 'the text'}"
                f": {error}"
            ) from error
        return dict(inputs.to(self.model.device))

    def with_text(self, inputs: dict[str, torch.Tensor], text: torch.Tensor) -> dict[str, torch.Tensor]:
        """The inputs with token ids [n] after the prompt."""
        longer = dict(inputs)
        tail = text.to(inputs["input_ids"].device)[None]
        longer["input_ids"] = torch.cat([inputs["input_ids"], tail], 1)
        for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
            if name in longer:
                longer[name] = torch.cat([longer[name], torch.full_like(tail, value, dtype=longer[name].dtype)], 1)
        return longer

    @torch.no_grad()
    def read(self, inputs: dict[str, torch.Tensor], text: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [n, V] float32 at which the model would write each next token of `text` [n]."""
        longer = self.with_text(inputs, text)
        logits = self.model(**longer, use_cache=False, logits_to_keep=len(text) + 1).logits[0, -len(text) - 1 : -1]
        return logits.float().log_softmax(-1)

    @torch.no_grad()
    def write(
        self,
        inputs: dict[str, torch.Tensor],
        steps: int,
        exact: bool = True,
        temperature: float = 0.0,
        **options: Any,
    ) -> torch.Tensor:
        """What the model writes [n].

        Args:
            inputs: of the prompt (and text so far).
            steps: at most so many tokens.
            exact: exactly so many: the end token is held back, so that long outputs can be measured.
            temperature: 0 always takes the likeliest token.
            options: further arguments of generate().
        """
        hold = list(self.backbone.visual_token_ids())  # a typed placeholder is no image and would confuse everything
        if exact:
            options["min_new_tokens"] = steps
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        options |= sampling if temperature else sampling | _no_sampling(self.model)
        out = self.model.generate(**inputs, max_new_tokens=steps, suppress_tokens=hold, **options)
        return out[0, inputs["input_ids"].shape[1] :].cpu()

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


def _no_sampling(model: Any) -> dict[str, Any]:
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


def without_images(sample: Sample) -> Sample:
    """The same question about nothing."""
    return replace(sample, images=(), videos=())


def read_dataset(path: str | Path) -> list[Sample]:
    """Samples of a JSONL file: per line "prompt", "image" or "images", and, if known, "answer" and "reply".

    Image paths are relative to the file.

    Raises:
        KeepsightError: naming the line that cannot be used.
    """
    from keepsight.train.images import open_image

    path = Path(path)
    samples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise KeepsightError(f"{path}, line {number}: not JSON ({error.msg}).") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise KeepsightError(
                f"{path}, line {number}: expected an object such as "
                '{"image": "a.png", "prompt": "What is it?", "answer": "a cat"}.'
            )
        unknown = set(entry) - {"prompt", "image", "images", "answer", "reply", "id"}
        if unknown:
            raise KeepsightError(
                f"{path}, line {number}: unknown fields {sorted(unknown)}; known are prompt, image, images, answer, "
                "reply and id."
            )
        images = entry.get("images", entry.get("image", []))
        images = images if isinstance(images, list) else [images]
        answer = entry.get("answer")
        samples.append(
            Sample(
                prompt=entry["prompt"],
                images=tuple(open_image(image, path.parent) for image in images),
                answer=None if answer is None else str(answer),
                reply=str(entry.get("reply", "")),
            )
        )
    if not samples:
        raise KeepsightError(f"{path}: no samples in it.")
    return samples


# -- the lab's own cases -----------------------------------------------------------------------------------------
def speaks_lab(processor: Any) -> bool:
    """Whether this is the reference VLM's processor (or of another base made by `keepsight lab pretrain`)."""
    try:
        from keepsight.lab.narration import TOKEN
    except ImportError:
        return False
    return getattr(processor, "tokenizer", None) is not None and processor.tokenizer.get_vocab() == TOKEN


def lab_cases(processor: Any, count: int, length: int, seed: int = 0) -> list[Case]:
    """Narrations about unseen test glyphs, each with six answers near `length` generated tokens.

    Raises:
        ImportError: without the lab extra, which has the glyphs.
    """
    from keepsight.lab.evaluation import SCORED
    from keepsight.lab.narration import DESCRIBE, gaps_for_length, make_narrations

    gaps = gaps_for_length(length)
    batch = make_narrations(processor, gaps, count, "test", np.random.default_rng([seed, length]))
    cases = []
    for row in range(count):
        text = batch.input_ids[row, batch.start : -1]
        places = [int(a) - batch.start for a in batch.answers[-SCORED:]]
        sample = Sample(DESCRIBE, (batch.images[row],))
        cases.append(Case(sample, text, [(p, p + 1) for p in places], batch.digits[row], batch.cells[row, -SCORED:]))
    return cases


def stand_in_images(like: Sequence[Any], count: int = 4, seed: int = 0) -> list[list[Any]]:
    """Other images of the same sizes, for when there is no second sample: random smooth colour fields."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    sets = []
    for _ in range(count):
        images = []
        for image in like:
            coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            images.append(coarse.resize((image.width, image.height), Image.Resampling.BICUBIC))
        sets.append(images)
    return sets
