"""What clients can name as `model`: with its processor, its limits, and what is known of its words."""

from __future__ import annotations

import copy
from typing import Any

from keepsight.serve.hf.grammar import Grammar, Grammars
from keepsight.serve.hf.served import Served
from keepsight.serve.openai.asked.request import ChatRequest
from keepsight.serve.openai.asked.tools import asks_in_known_form
from keepsight.serve.openai.images.sources import ImageSources
from keepsight.serve.openai.names import TokenNames
from keepsight.serve.openai.prompts import Prompts
from keepsight.serve.openai.settings import Limits


class Offer:
    """One model of a server.

    Args:
        name: what clients call it.
        key: what the engine calls it.
        served: the model and what is known about it.
        limits: sizes.
        sources: where images come from.
        takes_videos: whether the engine does.
    """

    def __init__(
        self, name: str, key: str, served: Served, limits: Limits, sources: ImageSources, takes_videos: bool = True
    ):
        self.name, self.key, self.served = name, key, served
        self.prompts = Prompts(served, limits, sources, takes_videos)
        # Copies: a tokenizer is used by one thread at a time.
        self.token_names = TokenNames(copy.deepcopy(served.tokenizer))
        self.grammars = Grammars(copy.deepcopy(served.tokenizer), served.vocabulary, served.ends)
        self.reads_calls = asks_in_known_form(served.processor)

    def grammar(self, asked: ChatRequest) -> Grammar | None:
        """What the answers to a request are held to."""
        if asked.structured_outputs is not None:
            return self.grammars.compile_regex(asked.structured_outputs.regex, "structured_outputs.regex")
        held = asked.schema_asked
        return None if held is None else self.grammars.compile(held[1], held[0])

    def describe(self) -> dict[str, Any]:
        """OpenAI's model object."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.served.created,
            "owned_by": "keepsight",
            "keepsight": {
                "memories": list(self.served.memories),
                "adapters": [{"name": name, "method": method} for name, method in self.served.adapters],
            },
        }
