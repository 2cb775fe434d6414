"""PvmConfig: everything a persistent visual memory can be told, and how the rest is resolved from the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from peft.utils import PeftType

from keepsight.backbone import Backbone
from keepsight.peft_method import MemoryConfig, refuse_unknown_keys
from keepsight.pvm.module import BlockShape

#: The layers the paper injects at, by (model_type, number of decoder layers, width). Elsewhere: the 8B model's stride.
PAPER_LAYERS = {
    ("qwen3_vl", 36, 4096): [8, 16, 24],  # Qwen3-VL-8B
    ("qwen3_vl", 36, 2560): [5, 11, 17],  # Qwen3-VL-4B
}
PAPER_WIDTH = 512


@refuse_unknown_keys
@dataclass
class PvmConfig(MemoryConfig):
    """Configuration of PVM, persistent visual memory (arXiv 2605.00814).

    `PvmConfig()` resolves every size from the model it is put on; what it resolved to stands in the saved
    `adapter_config.json`. It says what a memory is; how one is trained so that its look-up forms is up to the trainer
    (`keepsight train pvm`, or `keepsight.train.pvm.blindfold.blindfold_callback` with any other).

    Args:
        layers: decoder layers that get a block. Default: the paper's for Qwen3-VL 4B (5, 11, 17) and 8B (8, 16, 24),
            the 8B model's stride (8/36 of the depth, three blocks) elsewhere.
        width: latent width W. Default: 512, or what fits the model's width and head size below that.
        ffn_width: inner width of the block's SwiGLU. Default: W * intermediate / hidden size of the backbone.
        head_dim: width of one attention head. Default: the backbone's.
        num_kv_heads: key/value heads. Default: grouped as in the backbone.
        attention_bias: biases in the block's attention projections. Default: as the backbone's `attention_bias`.
        causal: a text position retrieves from the images before it (default: prefix caching, chunked prefill and
            multi-turn chat need that). False is the published rule, under which text before an image also reads it.
        branch: "memory" (default), or "mlp" for the paper's iso-parameter control: a parallel feed-forward branch of
            the same parameter count that looks at no image.
        init_gate: start value of every gate; 0 leaves the model unchanged, bit for bit.
        detach_visual: no gradient flows through the memory into projector and vision encoder (the paper freezes the
            vision encoder). False needs non-reentrant gradient checkpointing.

    Raises:
        ValueError: for unknown names, and for values no model could use.
    """

    layers: list[int] | None = field(default=None)
    width: int | None = field(default=None)
    ffn_width: int | None = field(default=None)
    head_dim: int | None = field(default=None)
    num_kv_heads: int | None = field(default=None)
    attention_bias: bool | None = field(default=None)
    eps: float | None = field(default=None)
    causal: bool = field(default=True)
    branch: Literal["memory", "mlp"] = field(default="memory")
    init_gate: float = field(default=0.0)
    detach_visual: bool = field(default=True)
    # Which base the sizes were resolved for; filled in when the config meets its model.
    base_model_type: str | None = field(default=None)
    base_num_layers: int | None = field(default=None)
    base_hidden_size: int | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("PVM")
        # PEFT finds the modules to work on by this attribute; it follows from `layers` and is never saved.
        self.target_modules: str | None = None
        if self.branch not in ("memory", "mlp"):
            raise ValueError(f"branch={self.branch!r}: expected 'memory' or 'mlp'.")
        if self.layers is not None:
            if not self.layers:
                raise ValueError("layers=[] gives no layer a memory; leave layers out for the default, or name some.")
            if len(set(self.layers)) != len(self.layers):
                raise ValueError(f"layers={self.layers} names a layer twice; each layer can carry one block.")
            self.layers = sorted(self.layers)
        for name in ("width", "ffn_width", "head_dim", "num_kv_heads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value!r}: expected a positive whole number.")

    @property
    def block_shape(self) -> BlockShape:
        """Sizes of a block, once resolved by `resolve`."""
        assert self.base_hidden_size is not None, "resolve() comes first"
        assert self.width is not None
        assert self.ffn_width is not None
        assert self.head_dim is not None
        assert self.num_kv_heads is not None
        return BlockShape(
            hidden_size=self.base_hidden_size,
            width=self.width,
            head_dim=self.head_dim,
            num_kv_heads=self.num_kv_heads,
            ffn_width=self.ffn_width,
            bias=bool(self.attention_bias),
            eps=1e-6 if self.eps is None else self.eps,
        )

    def resolve(self, backbone: Backbone) -> None:
        """Fill in what was left open from the model, and check the rest against it.

        Raises:
            AdapterMismatchError: if the config was resolved for another base.
            ValueError: if layers are out of range or sizes do not divide.
        """
        text, depth = backbone.text_config, len(backbone.layers)
        found = self.check_base(backbone.model.config)
        for name, value in found.items():
            setattr(self, name, value)

        if self.layers is None:
            self.layers = default_layers(found["base_model_type"], depth, text.hidden_size)
        outside = [i for i in self.layers if not 0 <= i < depth]
        if outside:
            raise ValueError(f"layers={self.layers}: {outside} out of range; the model has layers 0 to {depth - 1}.")

        backbone_head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        if self.head_dim is None:
            self.head_dim = backbone_head_dim
        if self.width is None:
            fits = min(PAPER_WIDTH, text.hidden_size) // self.head_dim * self.head_dim
            self.width = max(fits, self.head_dim)
        if self.width % self.head_dim:
            below = self.width // self.head_dim * self.head_dim
            raise ValueError(
                f"width={self.width} is not a multiple of head_dim={self.head_dim}. "
                f"Try {below or self.head_dim} or {below + self.head_dim}."
            )
        heads = self.width // self.head_dim
        if self.num_kv_heads is None:
            group = max(1, text.num_attention_heads // text.num_key_value_heads)
            self.num_kv_heads = next(n for n in range(max(1, heads // group), 0, -1) if heads % n == 0)
        if heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} does not divide the {heads} heads "
                f"(width {self.width} / head_dim {self.head_dim})."
            )
        if self.ffn_width is None:
            self.ffn_width = int(self.width * _intermediate_size(text) / text.hidden_size)
        if self.attention_bias is None:
            self.attention_bias = bool(getattr(text, "attention_bias", False))
        if self.eps is None:
            self.eps = float(getattr(text, "rms_norm_eps", 1e-6))


def default_layers(model_type: str, depth: int, hidden_size: int) -> list[int]:
    """The paper's layers where the paper names them; elsewhere the 8B model's stride (8/36 of the depth)."""
    if (model_type, depth, hidden_size) in PAPER_LAYERS:
        return list(PAPER_LAYERS[model_type, depth, hidden_size])
    stride = max(1, round(depth * 8 / 36))
    return [i for i in (stride, 2 * stride, 3 * stride) if i < depth] or [0]


def _intermediate_size(text: Any) -> int:
    """Width of the backbone's feed-forward network; of its active experts where it has experts only."""
    size = getattr(text, "intermediate_size", None)
    return size or text.moe_intermediate_size * text.num_experts_per_tok
