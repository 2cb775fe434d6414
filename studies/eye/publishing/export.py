"""The whole model as an ordinary Qwen2.5-VL checkpoint, with a processor that asks it as its training did."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from safetensors import safe_open

from keepsight.errors import KeepsightError
from keepsight.modes import readable
from studies.eye.comparing.methods import Trial, equipped
from studies.eye.language import SPECIAL
from studies.eye.sizes import Size

TEMPLATE = """
{%- for message in messages -%}
  {%- set parts = message['content'] -%}
  {%- if parts is string -%}{%- set parts = [{'type': 'text', 'text': parts}] -%}{%- endif -%}
  {%- set turn = namespace(of='') -%}
  {%- for part in parts -%}
    {%- if part['type'] not in ('image', 'text') -%}
      {{- raise_exception('This eye was shown single images only, and here is a part of type ' + part['type'] + '.') -}}
    {%- endif -%}
    {%- if part['type'] != turn.of -%}
      {{- ('<|im_end|>\n' if turn.of else '') + '<|im_start|>' + message['role'] + '\n' -}}
      {%- set turn.of = part['type'] -%}
    {%- endif -%}
    {{- FRAMED if part['type'] == 'image' else part['text'] -}}
  {%- endfor -%}
  {{- '<|im_end|>\n' if turn.of else '' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
"""As `studies/eye/sequences.py` lays out: an image has a turn of its own, and the question about it the next one."""


def export(model: Any, tokenizer: Any, size: Size, side: int, folder: Path) -> None:
    """Write model and processor into `folder`, as transformers saves and loads them.

    Args:
        model: the language model with its eye (`made_model`), in float32 as it was measured.
        tokenizer: the language model's.
        size: of the eye.
        side: pictures along the side of an image: 1 brings every image to the size of one picture.
        folder: made where it is not there.
    """
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    model.save_pretrained(folder)
    processor_of(tokenizer, size, side).save_pretrained(folder)
    readable(folder.glob("*.safetensors"))


def trial_of(file: Path) -> Trial:
    """What was trained into this checkpoint of `python -m studies eye methods`.

    Raises:
        KeepsightError: there is no such training, it is not done, or it made no adapter.
    """
    if not file.is_file():
        there = ", ".join(sorted(path.stem for path in file.parent.glob("*.safetensors"))) or "none"
        raise KeepsightError(f"--method {file.stem}: no training of this eye is called so. There are: {there}.")
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    settings = json.loads(about["settings"])
    trial = Trial.of(settings)
    if int(about["step"]) < trial.steps:
        raise KeepsightError(f"--method {file.stem} is at step {about['step']} of {trial.steps}: let it be trained.")
    if trial.method == "sft":
        raise KeepsightError(f"--method {file.stem} trained the model's own weights, so it is no adapter.")
    return trial


def export_method(model: Any, file: Path, base: Path, folder: Path) -> None:
    """Write what `python -m studies eye methods` trained as an adapter of PEFT, for the exported model.

    Args:
        model: the language model with its eye; the method is put on it.
        file: the training's checkpoint (`trial_of`).
        base: folder of the exported model, which the adapter names.
        folder: of the adapter.
    """
    trained = equipped(model, trial_of(file))
    with safe_open(file, "pt") as opened:
        for name, value in trained.named_parameters():
            if value.requires_grad:
                value.data.copy_(opened.get_tensor(f"weight.{name}"))
    trained.active_peft_config.base_model_name_or_path = str(base.resolve())
    trained.save_pretrained(folder)
    readable(folder.glob("*.safetensors"))


def processor_of(tokenizer: Any, size: Size, side: int) -> Any:
    """Qwen2.5-VL's processor, with the eye's patches, colours and size of images."""
    from transformers import AutoTokenizer, Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    shortest, longest = pixels(size, side)
    patches = {"patch_size": size.patch, "merge_size": size.merge, "temporal_patch_size": 1}
    colours = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    limits = {"shortest_edge": shortest, "longest_edge": longest}
    with tempfile.TemporaryDirectory() as name:  # a tokenizer learns its names for image tokens when it is loaded
        tokenizer.save_pretrained(name)
        own = AutoTokenizer.from_pretrained(
            name,
            extra_special_tokens={key: SPECIAL[f"{key}_id"] for key in ("image_token", "video_token")},
            trust_remote_code=False,
        )
    framed = "".join(SPECIAL[f"{key}_id"] for key in ("vision_start_token", "image_token", "vision_end_token"))
    own.chat_template = TEMPLATE.strip().replace("FRAMED", repr(framed))
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**patches, **colours, size=limits),
        own,
        Qwen2VLVideoProcessor(**patches, **colours, size=limits),  # the class wants one; the template refuses videos
        chat_template=own.chat_template,
    )


def pixels(size: Size, side: int) -> tuple[int, int]:
    """The fewest and most pixels of an image, such that Qwen2-VL's processor brings every square to the eye's size.

    It keeps an image's shape but for rounding to whole tokens. With these limits all shapes between n : n + 1 and
    n + 1 : n become squares of n x n tokens, n along the side: 3 : 4 to 4 : 3 for a single picture of 3 x 3.
    """
    along, token = side * size.tokens, (size.patch * size.merge) ** 2
    return along**3 * token // (along + 1), along * (along + 1) * token - 1
