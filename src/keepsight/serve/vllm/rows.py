"""A VLM of vLLM that knows VisMem's four special tokens. It forms no memories; `vismem.py` does, beside it.

The tokens live behind the base's vocabulary, whatever ids the tokenizer gives them, so that a request without memory
has the base's own rows and columns, all of them:

    embed_input_ids   their embeddings are written over what the table gives; latents come in as prompt embeddings
    compute_logits    their logits are the last four columns
    load_weights      the table and the head grow by four rows of zeros
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from vllm.config import VllmConfig

from keepsight.errors import BrokenAdapterError
from keepsight.serve.vllm.names import ROWS_KEY, ROWS_MODULE
from keepsight.vismem.tokens import TokenRows

_TABLES = ("embed_tokens.weight", "lm_head.weight")


class WithRows:
    """Mixin: `class KeepsightLatentX(WithRows, X)` is vLLM's model X with four more tokens."""

    supports_pp = False
    rename_weights: tuple[str, str] | None = None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        config = vllm_config.model_config.hf_config
        told = getattr(config, ROWS_KEY)
        width = vllm_config.model_config.get_hidden_size()
        self._vocabulary: int = told["vocabulary"]
        self._ids = [self._vocabulary + i for i in range(4)]
        self.memory_rows = TokenRows(width, told["tied"])
        # vLLM hands the models with deep vision features (Qwen3-VL) several embeddings per position, side by side.
        self._widest = width * (1 + getattr(self, "deepstack_num_level", 0))

    def embed_input_ids(
        self, input_ids: torch.Tensor, multimodal_embeddings: Any = None, *, is_multimodal: torch.Tensor | None = None
    ) -> torch.Tensor:
        """vLLM's own, and the special tokens' rows; not where latents stand."""
        if multimodal_embeddings is not None and len(multimodal_embeddings):
            multimodal_embeddings = [
                x if x.shape[-1] == self._widest else F.pad(x, (0, self._widest - x.shape[-1]))
                for x in multimodal_embeddings
            ]
        embeds = super().embed_input_ids(  # type: ignore[misc]
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )
        if is_multimodal is not None:
            input_ids = input_ids.masked_fill(is_multimodal.to(input_ids.device), 0)
        return self.memory_rows.embed(input_ids, embeds, self._ids)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits [n, V + 4]."""
        logits = super().compute_logits(hidden_states)  # type: ignore[misc]
        return None if logits is None else self.memory_rows.score(hidden_states, logits, self._ids)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """vLLM's own, with longer tables, and the tokens' rows.

        Raises:
            BrokenAdapterError: if the rows are not all there.
        """
        rows = dict(self.memory_rows.state_dict(keep_vars=True))
        ours: set[str] = set()

        def others() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                module, _, local = name.rpartition(".")
                if module == ROWS_MODULE:
                    rows[local].data.copy_(tensor)
                    ours.add(name)
                    continue
                if name.endswith(_TABLES) and len(tensor) == self._vocabulary:
                    tensor = F.pad(tensor, (0, 0, 0, 4))
                yield (re.sub(*self.rename_weights, name) if self.rename_weights else name), tensor

        loaded = super().load_weights(others())  # type: ignore[misc]
        missing = {f"{ROWS_MODULE}.{name}" for name in rows} - ours
        if missing:
            raise BrokenAdapterError(f"The weights lack {', '.join(sorted(missing))}, rows of VisMem's special tokens.")
        return loaded | ours
