"""The blindfold warm-up: for the first training steps, the frozen backbone's text cannot see the image.

This is keepsight's own addition; it is not in the PVM paper. Plain fine-tuning gives a fresh memory little reason to
look: while outputs are short, the backbone's own attention already answers, and the branch settles for what a parallel
MLP can do. The look-up through the memory then forms late or never, as a phase transition that depends on the seed.
Under the blindfold every answer that needs the image is wrong unless the memory brings it, so the look-up forms within
some hundred cheap steps on short samples::

    with blindfold(model):
        loss = model(**short_batch).loss
        loss.backward()

Nothing is kept on the model: the blindfold is a property of the calls made inside the `with` block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from keepsight.backbone import Backbone
from keepsight.compat import find_cache
from keepsight.errors import KeepsightError

_visual: ContextVar[torch.Tensor | None] = ContextVar("keepsight_blindfold_visual", default=None)


class BlindfoldError(KeepsightError):
    """This model, or this call, cannot be blindfolded."""


@contextmanager
def blindfold(model: nn.Module) -> Iterator[None]:
    """While active, text positions of the decoder cannot attend to visual ones in self-attention.

    Visual positions still see each other and the text before them, and PVM's branch still sees the images: it reads
    the visual embeddings as they enter the decoder, by an attention of its own. The blindfold is a 4D mask put in
    front of the decoder, so it works with gradient checkpointing, left or right padding, and rows with any number of
    images. It acts on calls made in this thread (or task) only, and leaves nothing behind, also after an exception.

    Args:
        model: a supported VLM, PEFT-wrapped or not.

    Raises:
        UnsupportedModelError: for an unknown family.
        BlindfoldError: where no mask can hide the image: layers with linear attention, flash or flex attention, cached
            or packed sequences.
    """
    backbone = Backbone.of(model)
    _check(backbone)
    here: ContextVar[bool] = ContextVar("keepsight_blindfold_here", default=False)

    def find_images(vlm: nn.Module, args: tuple, kwargs: dict) -> None:
        if here.get():
            _visual.set(backbone.visual_mask(_argument(args, kwargs, "input_ids", 0), kwargs.get("inputs_embeds")))

    def cover(decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        visual = _visual.get()
        if not here.get() or visual is None:
            return None
        _visual.set(None)
        _check_call(args, kwargs)
        embeds = kwargs["inputs_embeds"]
        mask = blindfold_mask(visual, kwargs.get("attention_mask"), embeds.dtype)
        return args, {**kwargs, "attention_mask": mask}

    handles = [
        backbone.vlm.register_forward_pre_hook(find_images, with_kwargs=True),
        backbone.decoder.register_forward_pre_hook(cover, with_kwargs=True),
    ]
    token = here.set(True)
    try:
        yield
    finally:
        here.reset(token)
        _visual.set(None)
        for handle in handles:
            handle.remove()


def blindfold_mask(visual: torch.Tensor, attention_mask: Any, dtype: torch.dtype) -> torch.Tensor:
    """The causal mask in which text cannot see images, as additive values for eager and SDPA attention.

    Args:
        visual: bool [B, T], true at image and video positions.
        attention_mask: None, a padding mask [B, T] (1 keeps), or a 4D mask [B, 1, T, T], boolean (true keeps) or
            additive.
        dtype: of the result.

    Returns:
        [B, 1, T, T], 0 where a row may look and the most negative number elsewhere. A row that may look nowhere
        (padding) looks at itself, so that no softmax is empty.
    """
    rows, size = visual.shape
    keep = torch.ones(size, size, dtype=torch.bool, device=visual.device).tril()[None].expand(rows, -1, -1)
    if attention_mask is not None and attention_mask.dim() == 2:
        keep = keep & attention_mask.to(visual.device).bool()[:, None, :]
    elif attention_mask is not None:
        given = attention_mask[:, 0, :, :size].to(visual.device)
        keep = keep & (given if given.dtype == torch.bool else given == 0)
    keep = keep & ~(~visual[:, :, None] & visual[:, None, :])
    keep = keep | torch.eye(size, dtype=torch.bool, device=visual.device)
    return torch.zeros(rows, size, size, dtype=dtype, device=visual.device).masked_fill(~keep, torch.finfo(dtype).min)[
        :, None
    ]


def _argument(args: tuple, kwargs: dict, name: str, index: int) -> Any:
    if name in kwargs:
        return kwargs[name]
    return args[index] if index < len(args) else None


def _check(backbone: Backbone) -> None:
    linear = [i for i, layer in enumerate(backbone.layers) if not Backbone.has_softmax_attention(layer)]
    if linear:
        raise BlindfoldError(
            f"{backbone.family.name} cannot be blindfolded: layers {linear} mix tokens by linear attention, which "
            f"carries the image "
            "on in a running state that no mask can hide it from. Train the memory without the warm-up (0 blindfold "
            "steps)."
        )
    implementation = backbone.decoder.config._attn_implementation  # pyright: ignore
    if implementation not in ("sdpa", "eager"):
        raise BlindfoldError(
            f"The blindfold is a 4D attention mask, and {implementation!r} attention takes none. "
            "Load the model with attn_implementation='sdpa' for the warm-up."
        )


def _check_call(args: tuple, kwargs: dict) -> None:
    cache = find_cache(args, kwargs)
    length = cache.get_seq_length() if cache is not None else 0
    if isinstance(length, torch.Tensor):
        length = int(length)
    if length:
        raise BlindfoldError(
            f"A blindfolded call must hold its whole sequence, and this one continues a cache of {length} tokens. "
            "The blindfold is for training steps; generate outside of the `with` block."
        )
    if any(kwargs.get(name) is not None for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")):
        raise BlindfoldError("Several samples are packed into one row; blindfolded training needs one sample per row.")
    if isinstance(kwargs.get("attention_mask"), dict):
        raise BlindfoldError(
            "This call brings one attention mask per layer type (sliding windows or generation); the blindfold needs "
            "the plain "
            "padding mask [B, T]."
        )
