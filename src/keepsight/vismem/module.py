"""VisMem as equations: plain modules of tensors in, tensors out. No transformers, no PEFT, no serving engine.

Letters as everywhere (B batch, D model width), and here: M visual states, Z text states, K queries, N memory tokens.

    H = [v_1..v_M, h_1..h_Z]                          what the model sees, and what it thinks since the last memory
    Q = B([H, Q_init])[-K:]                            the query builder; H does not attend to the queries
        x_l = FF(LN(x + SA(LN(x)))) + x                one layer of it, as the paper prints it
    M = F([X, Q, M_init])[-N:]                         a memory former: the base model under a low-rank adapter
    m = M / rms(M) * rms(embedding table) * gain       what is spliced in as input embeddings

The formers themselves run the base model and live in `formers.py`.

Where we deviate: the layers run in a bottleneck width (two layers at a width of 4096 would hold 400 million
parameters), and the memories' norm is matched to the embedding table, which the paper does not mention.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class QueryBuilderLayer(nn.Module):
    """One pre-norm layer: x_l = FF(LN(x + SA(LN(x)))) + x."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[B, T, W] -> [B, T, W]; mask: bool [B, 1, T, T], true where a position may look."""
        query, key, value = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        inner = x + self.out(seen.transpose(1, 2).flatten(2))
        return self.down(F.gelu(self.up(self.mlp_norm(inner)))) + x


class QueryBuilder(nn.Module):
    """B: turns what the model sees and thinks into K queries (paper, query builder).

    Args:
        hidden_size: D, the backbone's width.
        num_queries: K.
        width: W, the bottleneck width.
        layers: depth.
        heads: attention heads; must divide `width`.
    """

    def __init__(self, hidden_size: int, num_queries: int, width: int, layers: int, heads: int):
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.reduce = nn.Linear(hidden_size, width)
        self.queries = nn.Parameter(torch.randn(num_queries, width) * 0.02)  # Q_init
        self.layers = nn.ModuleList(QueryBuilderLayer(width, heads) for _ in range(layers))
        self.expand = nn.Linear(width, hidden_size)

    def forward(
        self, visual: torch.Tensor, visual_valid: torch.Tensor, text: torch.Tensor, text_valid: torch.Tensor
    ) -> torch.Tensor:
        """The queries.

        Args:
            visual: visual states [B, M, D].
            visual_valid: bool [B, M].
            text: text states [B, Z, D], oldest first.
            text_valid: bool [B, Z].

        Returns:
            Q [B, K, D].
        """
        x, count = self._reduce(torch.cat([visual, text], 1)), self.queries.shape[0]
        x = torch.cat([x, self.queries.to(x.dtype).expand(x.shape[0], -1, -1)], 1)
        mask = query_mask(torch.cat([visual_valid, text_valid], 1), count)
        for layer in self.layers:
            x = layer(x, mask)
        return self.expand(x[:, -count:])

    def _reduce(self, states: torch.Tensor) -> torch.Tensor:
        return self.reduce(self.norm(states.to(self.reduce.weight.dtype)))


def query_mask(valid: torch.Tensor, num_queries: int) -> torch.Tensor:
    """Who may look at whom in the query builder: bool [B, 1, L + K, L + K], of L states that are `valid` and K queries.

    All of H attends to all of H, the queries to everything, and nothing to the queries. A padded row sees itself: one
    that sees nothing would be NaN.
    """
    known = valid.shape[1]
    allowed = valid.new_zeros(len(valid), known + num_queries, known + num_queries)
    allowed[:, :, :known] = valid[:, None]
    allowed[:, known:, known:] = True
    return (allowed | torch.eye(known + num_queries, dtype=torch.bool, device=valid.device))[:, None]


class LowRank(nn.Module):
    """A low-rank update of one linear map: x -> scale * up(down(dropout(x))); zero until trained.

    Args:
        inputs: width of x.
        outputs: width of the result.
        rank: r.
        alpha: the scale is alpha / r.
        dropout: probability, in training mode only.
    """

    def __init__(self, inputs: int, outputs: int, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, inputs))
        self.up = nn.Parameter(torch.zeros(outputs, rank))
        self.scale, self.dropout = alpha / rank, dropout
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., inputs] -> [..., outputs], in x's dtype."""
        reduced = F.linear(F.dropout(x.to(self.down.dtype), self.dropout, self.training), self.down)
        return (F.linear(reduced, self.up) * self.scale).to(x.dtype)


class LowRankBank(nn.Module):
    """The low-rank updates of one former: one per (layer, projection).

    Args:
        shapes: (layer index, projection name) -> (inputs, outputs).
        rank: of every update.
        alpha: of every update.
        dropout: of every update.
    """

    def __init__(self, shapes: dict[tuple[int, str], tuple[int, int]], rank: int, alpha: float, dropout: float):
        super().__init__()
        self.updates = nn.ModuleDict(
            {f"{layer}_{name}": LowRank(*shape, rank, alpha, dropout) for (layer, name), shape in shapes.items()}
        )

    def get(self, layer: int, name: str) -> nn.Module | None:
        """The update of one projection, if it has one."""
        key = f"{layer}_{name}"
        return self.updates[key] if key in self.updates else None  # noqa: SIM401 - a ModuleDict has no get

    @property
    def is_untrained(self) -> bool:
        """Every update is still exactly zero."""
        ups = [p.detach() for name, p in self.named_parameters() if name.endswith(".up")]
        return not torch.stack([up.abs().amax().float() for up in ups]).any()


def match_rms(x: torch.Tensor, rms: torch.Tensor, gain: torch.Tensor | float = 1.0) -> torch.Tensor:
    """Rescale every vector of x [..., D] to root mean square `rms * gain`, computed in float32 or wider."""
    wide = x if x.dtype == torch.float64 else x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-12) * rms * gain


class LatentMemory(nn.Module):
    """All parameters of one VisMem adapter, and the equations that need no base model.

    Args:
        builder: the query builder.
        short_bank: low-rank updates on the vision encoder (F_s).
        long_bank: low-rank updates on the language model (F_l).
        rows: embedding and head rows of the four special tokens.
        vision_size: width of the vision encoder.
        short_positions: positions in the vision encoder that become the N_s short memories.
        num_long: N_l.
        embedding_rms: root mean square of the embedding table's entries.
    """

    def __init__(
        self,
        builder: QueryBuilder,
        short_bank: LowRankBank,
        long_bank: LowRankBank,
        rows: nn.Module,
        vision_size: int,
        short_positions: int,
        num_long: int,
        embedding_rms: float,
    ):
        super().__init__()
        hidden_size = builder.expand.out_features
        self.builder, self.short_bank, self.long_bank, self.rows = builder, short_bank, long_bank, rows
        self.to_vision = nn.Linear(hidden_size, vision_size)
        self.short_slots = nn.Parameter(torch.randn(short_positions, vision_size) * 0.02)  # M_init of F_s
        self.long_slots = nn.Parameter(torch.randn(num_long, hidden_size) * embedding_rms)  # M_init of F_l
        self.short_gain = nn.Parameter(torch.ones(()))
        self.long_gain = nn.Parameter(torch.ones(()))
        self.register_buffer("embedding_rms", torch.tensor(float(embedding_rms)))
        self.embedding_rms: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the memory computes in."""
        return self.short_slots.dtype

    def as_embeddings(self, formed: torch.Tensor, short: bool) -> torch.Tensor:
        """A former's output [B, N, D], with the norm of input embeddings."""
        gain = self.short_gain if short else self.long_gain
        return match_rms(formed, self.embedding_rms, gain)
