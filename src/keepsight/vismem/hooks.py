"""The route by which latents and special tokens reach an unforked model, and what is recorded on the way.

    model          pre-hook   refuses calls whose loss goes past the head, and warns of training without a memory
                   hook       sees to it that embedding and head were called, and so the special tokens seen
    embedding      pre-hook   ids that the base has no row for are hidden from it
                   hook       the special tokens' rows and the waiting latents are written over its output
    head           hook       the special tokens' logits are written over, or appended to, its output
    vision blocks  pre-hook   while generating: what enters the encoder is noted (that is what memory is formed from)
    decoder        hook       while generating: the last hidden states are noted
    decoder layers            while a memory is formed: the low-rank updates are added to the projections' outputs, and
                              PEFT layers of other adapters pass their base layer's output through

All hooks are permanent and silent unless a scope (`scope.py`) says otherwise; nothing is kept on the model. Under
gradient checkpointing a layer is computed again outside the scope, so the adapter also travels in the decoder's keyword
arguments, from which the token mixer's hook restores it.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from keepsight.backbone import Backbone
from keepsight.compat import has_paged_cache
from keepsight.errors import KeepsightError, KeepsightWarning
from keepsight.peft_method import refuse_adapter_names
from keepsight.vismem import scope
from keepsight.vismem.config import PROJECTIONS
from keepsight.vismem.scope import BANK, calls
from keepsight.vismem.tokens import latent_places
from keepsight.vismem.vision import bare

_PAST_THE_HEAD = (
    "This forward takes its loss or log-probabilities past the model's head (TRL's trainers and fused losses multiply "
    "by lm_head.weight themselves), where a latent memory's special tokens have no logits. Train a memory with "
    "`keepsight train vismem-formation` and `keepsight train vismem-invocation`; to train something else with it off, "
    "use `with model.disable_adapter():` or `model.base_model.disable_adapter_layers()`."
)

_NO_MEMORY = (
    "This forward trains a latent memory and holds none: query builder and formers get no gradient, and of the memory "
    "only the special tokens' rows can learn. Train it with `keepsight train vismem-formation` and `keepsight train "
    "vismem-invocation`, or give latents that were formed with gradients (`keepsight.vismem.splice`); to train "
    "something else with it off, use `with model.disable_adapter():` or `model.base_model.disable_adapter_layers()`."
)


class VisMemRoute:
    """All hooks of VisMem on one model, shared by its adapters.

    Args:
        backbone: the model's parts.
        branch: the `VisMemBranch` that holds the adapters.
    """

    def __init__(self, backbone: Backbone, branch: Any):
        self.branch = branch
        model = backbone.model
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        self._handles: list[Any] = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, with_kwargs=True),
            embedding.register_forward_pre_hook(self._hide_ids, with_kwargs=True),
            embedding.register_forward_hook(self._write_rows),
            head.register_forward_hook(self._write_logits, with_kwargs=True),
            backbone.decoder.register_forward_hook(_note_hidden, with_kwargs=True),
        ]
        for index, block in enumerate(backbone.vision_blocks):
            note = functools.partial(_note_vision, index, backbone.vision_size)
            self._handles.append(block.register_forward_pre_hook(note, with_kwargs=True))
        rotary = backbone.vision.rotary
        if rotary is not None:
            module: Any = backbone.vision_tower.get_submodule(rotary)
            self._handles.append(module.register_forward_pre_hook(_note_coordinates, with_kwargs=True))
        padding = backbone.vision.padding
        if padding is not None:
            note = functools.partial(_note_padding, padding)
            self._handles.append(backbone.vision_tower.register_forward_pre_hook(note, with_kwargs=True))
        for index, layer in enumerate(backbone.layers):
            mixer = Backbone.mixer(layer)
            self._handles.append(mixer.register_forward_pre_hook(_restore_scope, with_kwargs=True))
            ffn = layer.get_submodule(Backbone.parts(layer).ffn)
            self._handles.append(ffn.register_forward_hook(_end_scope, always_call=True))
            if Backbone.has_softmax_attention(layer):
                for name in filter(functools.partial(hasattr, mixer), PROJECTIONS):
                    projection = bare(getattr(mixer, name))
                    update = functools.partial(_add_update, index, name)
                    self._handles.append(projection.register_forward_hook(update))

    def remove(self) -> None:
        """Take every hook off the model."""
        for handle in self._handles:
            handle.remove()

    def shield(self, model: nn.Module) -> None:
        """Make other adapters' PEFT layers keep out of formations; looks for new ones every time.

        Raises:
            KeepsightError: if one of them is merged into the base's weights.
        """
        for name, module in model.named_modules():
            layer: Any = module
            if not isinstance(module, BaseTunerLayer) or not hasattr(module, "base_layer"):
                continue
            if module.merged:
                raise KeepsightError(
                    f"{name}: {', '.join(module.merged_adapters)} is merged into the base's weights, by which a memory "
                    "is formed without it. Call unmerge_adapter() first."
                )
            if _base_output not in layer._forward_hooks.values():
                self._handles.append(layer.register_forward_hook(_base_output, with_kwargs=True))

    def _begin(self, model: Any, args: tuple, kwargs: dict) -> None:
        if self.branch.active is None:
            return
        refuse_adapter_names(kwargs, self.branch.active_name)
        if has_paged_cache(kwargs):
            raise KeepsightError(
                "Continuous batching (generate_batch, or cache_implementation='paged') has a loop of its own, which "
                "forms no latent memories. Use generate(...) without it, or switch the memory off: `with "
                "model.disable_adapter():`."
            )
        call = calls.here
        if call.again:
            raise KeepsightError(
                "A decoder layer was computed again for its gradient, and its mlp was not called as a module: what was "
                "switched off for the formation of a memory stays off. This model's gradient checkpointing cannot be "
                "used with a latent memory."
            )
        if kwargs.get("fused_lm_head"):  # TRL's
            raise KeepsightError(_PAST_THE_HEAD)
        if model.training and torch.is_grad_enabled() and call.splice is None and self._learns_to_form():
            warnings.warn(_NO_MEMORY, KeepsightWarning, stacklevel=2)
        call.embedded = call.scored = False

    def _learns_to_form(self) -> bool:
        # A graph cannot warn. Every memory is formed from the query builder's output.
        return not torch.compiler.is_compiling() and self.branch.active.builder.queries.requires_grad

    def _end(self, model: Any, args: tuple, kwargs: dict, output: Any) -> None:
        if self.branch.active is None:
            return
        call = calls.here
        if not call.scored:
            raise KeepsightError(_PAST_THE_HEAD)
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is not None and not call.embedded and not call.only_words:
            raise KeepsightError(
                "The model was given input_ids and did not look them up in its input embedding "
                "(get_input_embeddings()), where a latent memory is spliced in: no memory would be seen."
            )

    def _hide_ids(self, embedding: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        call = calls.here
        call.ids = None
        if self.branch.active is None or call.only_words:
            return None
        call.ids = ids = args[0] if args else next(iter(kwargs.values()))  # by whatever name
        rows = embedding.weight.shape[0]
        if max(self.branch.config.token_ids) < rows:
            return None
        hidden = ids.masked_fill(ids >= rows, 0)
        return ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, next(iter(kwargs)): hidden})

    def _write_rows(self, embedding: Any, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        call = calls.here
        ids, call.ids = call.ids, None
        if ids is None:
            return None
        call.embedded = True
        splice = call.splice
        given = splice if splice is not None and splice.mask.shape == ids.shape else None
        if given is None and ids.ndim and ids.shape[-1] > 1 and not ids.is_meta:  # a place stands before an end token
            ids = _without_places(ids, list(self.branch.tokens.end.values()))
        output = self.branch.active.rows.embed(ids, output, self.branch.config.token_ids, self.branch.embedding_scale)
        if given is None:
            return output
        given.was_used = True
        values = given.values.to(output.device, output.dtype)
        return output.masked_scatter(given.mask.to(output.device)[..., None], values)

    def _write_logits(self, head: Any, args: tuple, kwargs: dict, output: torch.Tensor) -> torch.Tensor | None:
        active = self.branch.active
        if active is None:
            return None
        calls.here.scored = True
        states = args[0] if args else next(iter(kwargs.values()))
        return active.rows.score(states, output, self.branch.config.token_ids)


def _without_places(ids: torch.Tensor, ends: list[int]) -> torch.Tensor:
    """The ids, unless they hold the places of latents, which nobody gave; asked in compiled graphs too."""
    if torch.compiler.is_compiling():
        return _compiled_without_places(ids, ends)
    lost = int(latent_places(ids, ends).sum())
    if lost:
        raise KeepsightError(
            f"The input_ids hold the places of {lost} latents of memories (end tokens before an end token), and no "
            "latents were given. For generate: model.generate(..., invocations=out.invocations) of the output that "
            "they come from; for a forward: with splice(model, input_ids, out.invocations): ...; or leave the "
            "memories out of the text: ids[~branch.tokens.memory_mask(ids)]."
        )
    return ids


# A graph cannot ask what ids hold; an operator of its own, which graphs hold as one step, can. What comes of it goes
# into the embedding, so that no graph leaves it out; and it waits for the device, so that none is recorded with it.
@torch.library.custom_op(
    "keepsight::without_places",
    mutates_args=(),
    schema="(Tensor ids, int[] ends) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),
)
def _compiled_without_places(ids: torch.Tensor, ends: list[int]) -> torch.Tensor:
    return _without_places(ids, ends).clone()


@_compiled_without_places.register_fake
def _(ids: torch.Tensor, ends: list[int]) -> torch.Tensor:
    return torch.empty_like(ids)


def _note_hidden(decoder: Any, args: tuple, kwargs: dict, output: Any) -> None:
    watch = scope.current_watch()
    if watch is not None:
        watch.hidden, watch.embedded = getattr(output, "last_hidden_state", None), kwargs.get("inputs_embeds")


def _note_coordinates(rotary: Any, args: tuple, kwargs: dict) -> None:
    watch = scope.current_watch()
    if watch is not None:
        integers = (v for v in (*args, *kwargs.values()) if _is_tensor(v, floating=False) and v.ndim == 2)
        watch.vision_calls.append({"coordinates": next(integers, None), "cu_seqlens": {}})


def _note_padding(name: str, tower: Any, args: tuple, kwargs: dict) -> None:
    watch = scope.current_watch()
    if watch is not None:
        masks = (v for v in (kwargs.get(name), *args, *kwargs.values()) if _is_tensor(v, False) and v.ndim == 3)
        watch.vision_calls.append({"padding": next(masks, None), "cu_seqlens": {}})


def _note_vision(index: int, width: int, block: Any, args: tuple, kwargs: dict) -> None:
    """By what they are, whatever a release calls them: states [..., width], a pair of angles, ends of sequences."""
    watch = scope.current_watch()
    if watch is None:
        return
    given = (*args, *kwargs.values())
    if index == 0:
        if not watch.vision_calls or "x" in watch.vision_calls[-1]:
            watch.vision_calls.append({"cu_seqlens": {}})
        states = (v for v in given if _is_tensor(v, True) and v.ndim in (2, 3) and v.shape[-1] == width)
        pairs = (v for v in given if isinstance(v, tuple) and len(v) == 2 and all(_is_tensor(t, True) for t in v))
        watch.vision_calls[-1]["x"] = next(states, None)
        watch.vision_calls[-1]["rotary"] = next(pairs, None)
    ends = kwargs.get("cu_seqlens")
    if ends is None:
        ends = next((v for v in given if _is_tensor(v, False) and v.ndim == 1 and len(v) > 1), None)
    if ends is not None:
        watch.vision_calls[-1]["cu_seqlens"][index] = ends


def _is_tensor(value: Any, floating: bool) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() == floating


def _add_update(index: int, name: str, projection: Any, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
    call = calls.here
    bank = call.bank
    update = bank.get(index, name) if bank is not None else None
    if update is None:
        return None
    if not call.again:
        call.updates.add((index, name))
    return output + update(args[0]).to(output.dtype)


def _base_output(layer: Any, args: tuple, kwargs: dict, output: Any) -> Any:
    return bare(layer)(*args, **kwargs) if calls.here.base_only else None


def _restore_scope(mixer: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    if BANK not in kwargs:
        return None
    if calls.here.bank is None:
        scope.enter_again(kwargs[BANK])
    return args, {name: value for name, value in kwargs.items() if name != BANK}


def _end_scope(mlp: Any, args: tuple, output: Any) -> None:
    if calls.here.again:
        scope.leave_again()
