"""`keepsight generate`: ask a model about images, and watch the answer being written."""

from __future__ import annotations

import sys
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from keepsight.cli.common.console import check_device, quiet, refuse_twins, say, with_examples
from keepsight.cli.common.model import BUILT_IN, Adapters, Attention, Base, Device, Dtype, Images, Source
from keepsight.cli.common.progress import Waiting
from keepsight.errors import KeepsightError, KeepsightWarning


@with_examples(
    (
        "the tiny model that is built in; it reads grids of handwritten digits",
        "keepsight generate -i keepsight/digits.png -p read",
    ),
    (
        "a memory (its base is found by itself) and two images",
        'keepsight generate my-memory -i a.jpg -i b.jpg -p "What changed?"',
    ),
    (
        "the same base without its memory, to compare",
        'keepsight generate my-memory -i a.jpg -p "Describe it." --no-memory',
    ),
    (
        "the question stands behind a long text, which was said since the image",
        'keepsight generate my-memory -i a.jpg --said story.txt -p "What was on the table?"',
    ),
    (
        "the answer is begun already, and the model goes on",
        'keepsight generate my-memory -i a.jpg -p "Describe it." --prefill begun.txt',
    ),
    (
        "a memory and a LoRA together on a model of your choice",
        'keepsight generate Qwen/Qwen3-VL-4B-Instruct -a my-memory -a my-lora -i a.jpg -p "..."',
    ),
)
def generate(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to ask.")],
    source: Source = BUILT_IN,
    image: Images = None,
    adapter: Adapters = None,
    said: Annotated[
        Path | None,
        typer.Option(help="A text file: what the model has said since the images, in a turn before the prompt."),
    ] = None,
    prefill: Annotated[
        Path | None, typer.Option(help="A text file: how the answer begins. The model goes on behind it.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length limit of the answer.", min=1)] = 256,
    temperature: Annotated[
        float, typer.Option(help="0 always takes the likeliest token; 1 samples as trained.", min=0)
    ] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    no_memory: Annotated[bool, typer.Option("--no-memory", help="Switch the visual memory off, to compare.")] = False,
    show_memory: Annotated[
        bool, typer.Option("--show-memory", help="VisMem: say where which memory was invoked, after the answer.")
    ] = False,
    base: Base = None,
    dtype: Dtype = "auto",
    device: Device = None,
    attention: Attention = None,
) -> None:
    """Ask a model about images. The answer streams to stdout; everything else goes to stderr."""
    from keepsight.data.images import open_image

    images = [(path, open_image(path)) for path in image or []]
    if not prompt.strip():
        raise KeepsightError("--prompt is empty; ask something.")
    if said is not None and not images:
        raise KeepsightError("--said is what was said since an image, and there is none. Give one by --image.")
    between = None if said is None else _read("--said", said, "ask about the image at once")
    begun = None if prefill is None else _read("--prefill", prefill, "let the model begin")
    check_device(device)

    from keepsight.checkpoints.load import load_checked
    from keepsight.checkpoints.sources import check_sources
    from keepsight.data.collate import require_chat_template
    from keepsight.pvm import memory_off

    quiet()
    if seed is not None and temperature == 0:
        warnings.warn(
            "--seed has no effect at --temperature 0, which always takes the likeliest token.",
            KeepsightWarning,
            stacklevel=2,
        )
    base_name, infos = check_sources(source, adapter or [], base)
    refuse_twins(infos, "Leave one of them out.")
    methods = {info.method for info in infos}
    has_memory = bool(methods & {"PVM", "VISMEM"})
    has_latent = "VISMEM" in methods
    if show_memory and (no_memory or not has_latent):
        why = "--no-memory switches it off" if has_latent else f"{source} carries no VisMem"
        warnings.warn(f"--show-memory has no effect: {why}.", KeepsightWarning, stacklevel=2)
    if no_memory and not has_memory:
        warnings.warn(f"--no-memory has no effect: {source} carries no visual memory.", KeepsightWarning, stacklevel=2)
    if has_memory and not no_memory and not images:
        warnings.warn(
            "No --image is given, so the visual memory has nothing to remember.", KeepsightWarning, stacklevel=2
        )
    with Waiting(f"loading {base_name}"):
        model, processor = load_checked(base_name, infos, dtype=dtype, device=device, attn_implementation=attention)
    require_chat_template(processor)
    _refuse_typed(model, processor, "--prompt", prompt)
    _refuse_typed(model, processor, f"--said {said}", between or "")
    _refuse_typed(model, processor, f"--prefill {prefill}", begun or "")
    latent = {"return_dict_in_generate": True} if has_latent and show_memory and not no_memory else {}
    text = _chat(processor, len(images), between, prompt, begun)
    with memory_off(model) if no_memory else nullcontext():
        _answer(model, processor, images, text, max_new_tokens, temperature, seed, latent)


def _read(option: str, file: Path, without: str) -> str:
    """The text of a file that an option names; `without` is what leaving the option out does."""
    try:
        text = file.read_text(encoding="utf-8-sig").strip()
    except OSError as error:
        raise KeepsightError(f"{option} {file}: {error.strerror}. Expected a text file.") from error
    except UnicodeDecodeError as error:
        raise KeepsightError(f"{option} {file}: not UTF-8 text ({error.reason}). Save the file as UTF-8.") from error
    if not text:
        raise KeepsightError(f"{option} {file} is empty. Leave {option} out to {without}.")
    return text


def _refuse_typed(model: Any, processor: Any, option: str, words: str) -> None:
    """Raise if the words hold a token that is none to this model."""
    from keepsight.data.collate import ConversationCollator
    from keepsight.vismem import VisMemBranch

    branch = VisMemBranch.find(model)
    names = () if branch is None else branch.config.token_names
    typed = next((token for token in (*ConversationCollator(processor).placeholders, *names) if token in words), None)
    if typed is not None:
        raise KeepsightError(
            f"{option} holds {typed}, which stands for an image or a memory to this model. Give images by --image; a "
            "memory comes by itself. Leave the token out of the words."
        )


def _chat(processor: Any, images: int, said: str | None, prompt: str, begun: str | None) -> str:
    """The conversation as the model's chat template writes it, up to where the model goes on."""
    shown, asked = [{"type": "image"}] * images, {"type": "text", "text": prompt}
    messages: list[dict[str, Any]] = [{"role": "user", "content": [*shown, asked]}]
    if said is not None:
        told = {"role": "assistant", "content": [{"type": "text", "text": said}]}
        messages = [{"role": "user", "content": shown}, told, {"role": "user", "content": [asked]}]
    if begun is None:
        return str(processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    messages.append({"role": "assistant", "content": [{"type": "text", "text": begun}]})
    try:
        return str(processor.apply_chat_template(messages, tokenize=False, continue_final_message=True))
    except ValueError as error:
        raise KeepsightError(
            f"--prefill: this model's chat template does not leave an answer as it was begun ({error})"
        ) from error


def _answer(
    model: Any,
    processor: Any,
    images: list[tuple[str, Any]],
    text: str,
    max_new_tokens: int,
    temperature: float,
    seed: int | None,
    options: dict[str, Any],
) -> None:
    import torch

    from keepsight.data.collate import may_refuse

    given = [[picture for _, picture in images]] if images else None
    sizes = ", ".join(f"{path} ({picture.width} x {picture.height} pixels)" for path, picture in images)
    with may_refuse(processor, sizes or "the prompt"):
        # the chat template writes all special tokens; training tokenizes in the same way
        inputs = processor(text=[text], images=given, add_special_tokens=False, return_tensors="pt")
    inputs = inputs.to(model.device)
    if seed is not None:
        torch.manual_seed(seed)
    stream = _make_streamer(processor.tokenizer)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    started = time.perf_counter()
    result = model.generate(
        **inputs, max_new_tokens=max_new_tokens, streamer=stream, logits_processor=[_refuse_nan], **sampling, **options
    )
    seconds = time.perf_counter() - started
    length = inputs["input_ids"].shape[1]
    written = getattr(result, "sequences", result).shape[1] - length  # a VisMem's positions count
    say(
        f"[{stream.tokens} tokens in {seconds:.1f} s after a prompt of {length}; "
        f"{'stopped at --max-new-tokens' if written >= max_new_tokens else 'finished'}]"
    )
    if "return_dict_in_generate" in options:
        _show_memory(result, processor, length)


def _show_memory(result: Any, processor: Any, prompt: int) -> None:
    """Say where which memory was invoked."""
    found = result.invocations[0]
    if not found:
        say("[no memory was invoked]")
    for invocation in found:
        before = processor.tokenizer.decode(result.sequences[0, prompt : invocation.position], skip_special_tokens=True)
        formation = invocation.formation
        say(
            f"[{invocation.kind}-term memory at token {invocation.position - prompt}, after {before[-30:]!r}: "
            f"{len(invocation.latents)} latents, formed from {len(formation.sight.visual)} visual and "
            f"{len(formation.text)} text states]"
        )


def _refuse_nan(input_ids: Any, scores: Any) -> Any:
    """A logits processor that changes nothing and stops at the first number that is none."""
    if scores.isnan().any():
        raise KeepsightError(
            "The model computes NaN. Its weights are damaged, or the dtype overflows: try --dtype float32 (or "
            "bfloat16), and check adapters with `keepsight info`."
        )
    return scores


def _make_streamer(tokenizer: Any) -> Any:
    from transformers import TextStreamer

    class Stdout(TextStreamer):
        """Writes words as they come, and counts tokens."""

        tokens = 0

        def put(self, value: Any) -> None:
            if not (self.skip_prompt and self.next_tokens_are_prompt):
                self.tokens += value.numel()
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            sys.stdout.write(text + ("\n" if stream_end else ""))
            sys.stdout.flush()

    return Stdout(tokenizer, skip_prompt=True, skip_special_tokens=True)
