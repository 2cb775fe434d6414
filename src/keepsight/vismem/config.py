"""VisMemConfig: everything a latent vision memory can be told, and how the rest is resolved from the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from peft.utils import PeftType

from keepsight.backbone import Backbone, family_of
from keepsight.errors import UnsupportedModelError
from keepsight.peft_method import MemoryConfig, refuse_unknown_keys

PolicyName = Literal["free", "off", "forced", "random", "only_short", "only_long", "reversed"]
#: What the low-rank adapters can be put on, in either former.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
#: short invoke, short end, long invoke, long end
TOKEN_NAMES = ("<|short_memory|>", "<|/short_memory|>", "<|long_memory|>", "<|/long_memory|>")


@refuse_unknown_keys
@dataclass
class VisMemConfig(MemoryConfig):
    """Configuration of VisMem, latent vision memory (arXiv 2511.11007). The defaults are the paper's.

    **Read this before training on long outputs:** `max_text_states`. The long-term former is the same language model
    that writes the text, so it loses sight of the image as that model does: with hundreds of text states between the
    visual states and its queries, it drifts with them. In our digit laboratory (a 0.64M-parameter model, five
    seeds, docs/evidence/vismem-memory.md) the same trained weights read .48 of the facts after 1,024 tokens with all
    text states and **.88 with the latest 8**. The default is `None`, which is the paper, until there is evidence
    from large models.

    Args:
        num_queries: K, queries that the query builder makes.
        num_short: N_s, latent tokens of a short-term memory (the appendix of the paper says 4).
        num_long: N_l, latent tokens of a long-term memory (the appendix of the paper says 8).
        query_width: width of the query builder. Default: 512, or the model's width below that. (The paper runs it in
            the model's own width, 400M parameters at a width of 4096.)
        query_layers: depth of the query builder.
        query_heads: attention heads of the query builder.
        short_rank: rank of the short-term former's low-rank adapter, on the vision encoder.
        short_alpha: its scale is `short_alpha / short_rank`.
        short_dropout: its dropout, in training mode only: that is the warm start. Both stages train in eval mode, since
            the ratio of policies would measure the dropout.
        short_targets: attention projections that it changes, out of q_proj, k_proj, v_proj, o_proj. Vision encoders
            with a fused qkv layer are changed in the part that is named.
        long_rank: as above, for the long-term former, on the language model.
        long_alpha: as above.
        long_dropout: as above.
        long_targets: as above.
        long_input: X, what the long-term former runs on. "states": H, the last hidden states of the image and of the
            text since the last memory. "tokens": the paper's words, "the token sequence of the language model": its
            input embeddings of everything so far, prompt and question, image, text and earlier memories, in order.
            Why "states" is the default, with figures: docs/vismem.md.
        slot_layout: where the short-term memory's positions lie: "strip", under the image; or "grid", spread over it.
        max_text_states: how many of the latest text states the memory is formed from; None: all since the last memory.
            With `long_input="tokens"` also how many tokens behind the prompt.
        policy: when memory is invoked, unless `generate(memory=...)` says otherwise: "free" (the model decides),
            "off", "random", "only_short", "only_long" or "reversed"; see `MemoryPolicy`.
        max_invocations: guard against invocation loops: at most so many per sequence.
        min_words: another guard, where the model decides: so many words at least between two memories. None: as many as
            the first of the two has latents.
        random_probability: policy "random": probability of an invocation after a delimiter.
        delimiters: what ends a clause; `add_memory_tokens` finds their tokens. Invocation tokens start as the first.
        token_names: the four special tokens: short invoke, short end, long invoke, long end.
        token_ids: their ids. Set by `add_memory_tokens`; without it, the four ids after the embedding matrix.
        delimiter_ids: ids of the delimiters. Set by `add_memory_tokens`.
        perturbation: how far the new rows start from the delimiter's, relative to its norm.
        untied_rows: give the special tokens head rows of their own also where the base ties head and embedding, so
            that whether to invoke can be learned without changing what an invocation token is as an input.

    Raises:
        ValueError: for unknown names, and for values no model could use.
    """

    #: What saved configurations may still hold, the only value of it that means what is computed now, and a lesson.
    retired: ClassVar[dict[str, tuple[Any, str]]] = {
        "form": (
            "literal",
            "every memory is formed as published now ('literal'). The incremental form, another function, is gone (it "
            "was slower on a GPU): train this memory anew.",
        )
    }

    num_queries: int = field(default=8)
    num_short: int = field(default=8)
    num_long: int = field(default=16)
    query_width: int | None = field(default=None)
    query_layers: int = field(default=2)
    query_heads: int = field(default=8)
    short_rank: int = field(default=16)
    short_alpha: float = field(default=32)
    short_dropout: float = field(default=0.1)
    short_targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    long_rank: int = field(default=16)
    long_alpha: float = field(default=32)
    long_dropout: float = field(default=0.1)
    long_targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    long_input: Literal["states", "tokens"] = field(default="states")
    slot_layout: Literal["strip", "grid"] = field(default="strip")
    max_text_states: int | None = field(default=None)
    policy: PolicyName = field(default="free")
    max_invocations: int = field(default=8)
    min_words: int | None = field(default=None)
    random_probability: float = field(default=0.25)
    delimiters: list[str] = field(default_factory=lambda: [",", ".", ";", ":", "?", "!", "\n"])
    token_names: list[str] = field(default_factory=lambda: list(TOKEN_NAMES))
    token_ids: list[int] | None = field(default=None)
    delimiter_ids: list[int] | None = field(default=None)
    perturbation: float = field(default=0.1)
    untied_rows: bool = field(default=False)
    # Which base the sizes were resolved for; filled in when the config meets its model.
    base_model_type: str | None = field(default=None)
    base_num_layers: int | None = field(default=None)
    base_hidden_size: int | None = field(default=None)
    base_vision_size: int | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["VISMEM"]
        # PEFT finds the module to work on by this attribute; it follows from the model and is never saved.
        self.target_modules: str | None = None
        for name in ("num_queries", "num_short", "num_long", "query_layers", "query_heads", "short_rank", "long_rank"):
            _positive(name, getattr(self, name))
        for name in ("query_width", "max_text_states"):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
        if self.max_invocations < 1:
            raise ValueError(f"max_invocations={self.max_invocations}: to invoke nothing, write policy='off'.")
        if self.min_words is not None and self.min_words < 0:
            raise ValueError(f"min_words={self.min_words}: expected words between two memories, from 0.")
        for name in ("short_alpha", "long_alpha"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected a positive number.")
        for name in ("short_dropout", "long_dropout", "random_probability", "perturbation"):
            value = getattr(self, name)
            if not 0 <= value <= 1 or ("dropout" in name and value == 1):
                raise ValueError(f"{name}={value!r}: expected a number from 0 to 1.")
        for name in ("short_targets", "long_targets"):
            wrong = [t for t in getattr(self, name) if t not in PROJECTIONS]
            if wrong or not getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r}: expected some of {', '.join(PROJECTIONS)}.")
        _one_of("long_input", self.long_input, ("states", "tokens"))
        _one_of("slot_layout", self.slot_layout, ("strip", "grid"))
        if self.policy == "forced":
            raise ValueError(
                "policy='forced': the places are named with each call, generate(memory=MemoryPolicy('forced', "
                "at={0: 'short'})). In the config, choose what applies without them: 'free', 'random', 'off' ..."
            )
        _one_of("policy", self.policy, tuple(name for name in get_args(PolicyName) if name != "forced"))
        if len(set(self.token_names)) != 4:
            raise ValueError(f"token_names={self.token_names!r}: expected four different names.")
        if self.token_ids is not None and (len(set(self.token_ids)) != 4 or min(self.token_ids) < 0):
            raise ValueError(f"token_ids={self.token_ids!r}: expected four different token ids.")
        if not self.delimiters:
            raise ValueError("delimiters=[]: invocation tokens start as a delimiter's; name at least one.")
        if self.query_width is not None and self.query_width % self.query_heads:
            raise ValueError(f"query_width={self.query_width} is not a multiple of query_heads={self.query_heads}.")

    def resolve(self, backbone: Backbone) -> None:
        """Fill in what was left open from the model, and check the rest against it.

        Raises:
            AdapterMismatchError: if the config was resolved for another base.
            UnsupportedModelError: if the model's vision encoder is not described in `keepsight.backbone`.
        """
        text = backbone.text_config
        found = self.check_base(backbone.model.config)
        for name, value in found.items():
            setattr(self, name, value)
        if backbone.model.get_output_embeddings() is None:
            raise UnsupportedModelError(
                f"A {type(backbone.model).__name__} has no head, and writes no text into which latent memories could "
                "be spliced. Load the class that generates, with a name that ends in ForConditionalGeneration."
            )
        softmax = [layer for layer in backbone.layers if backbone.has_softmax_attention(layer)]
        for mixer in map(backbone.mixer, softmax):
            missing = [name for name in self.long_targets if not hasattr(mixer, name)]
            if missing:
                raise UnsupportedModelError(
                    f"The long-term former adapts {', '.join(self.long_targets)} of the language model's attention, "
                    f"and a {type(mixer).__name__} has no {', '.join(missing)}. This language model can have no latent "
                    "memory (VisMem), unless other long_targets are among its own; it can have a PVM."
                )
        if self.query_width is None:
            self.query_width = max(min(512, text.hidden_size) // self.query_heads, 1) * self.query_heads
        if self.token_ids is None:
            table = backbone.model.get_input_embeddings().weight
            self.token_ids = list(range(table.shape[0], table.shape[0] + 4))

    def _base_settings(self, model_config: Any) -> dict[str, Any]:
        parts = family_of(model_config).vision_parts(model_config)
        width = int(getattr(model_config.vision_config, parts.width))
        return super()._base_settings(model_config) | {"base_vision_size": width}

    @property
    def most_positions(self) -> int:
        """The most positions that the memories of one sequence take: what a length limit must leave beside words."""
        return self.max_invocations * (max(self.num_short, self.num_long) + 2)

    @property
    def has_bound_tokens(self) -> bool:
        """Whether `add_memory_tokens` has told which tokens are delimiters."""
        return self.delimiter_ids is not None


def _positive(name: str, value: Any) -> None:
    if value < 1:
        raise ValueError(f"{name}={value!r}: expected a positive whole number.")


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, allowed))}.")
