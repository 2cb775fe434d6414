"""What transformers' own generation tests check, written anew: their file is not in the source distribution.

Each check runs on the family's model with and without a memory, and holds or is listed in known.txt with its reason.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, StaticCache

from keepsight.compat import cache_argument

NEW = 6


class GenerationTests:
    """A mixin; the class beside it brings `model_tester` and `all_model_classes`."""

    model_tester: Any
    all_model_classes: tuple[Any, ...]

    def _made(self) -> tuple[Any, dict[str, torch.Tensor]]:
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        torch.manual_seed(0)
        model = self.all_model_classes[0](config).eval()
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
        return model, inputs

    def _written(self, **options: Any) -> Any:
        model, inputs = self._made()
        torch.manual_seed(1)
        return model.generate(**inputs, max_new_tokens=NEW, min_new_tokens=NEW, **options), model, inputs

    def _ids(self, out: Any) -> torch.Tensor:
        return getattr(out, "sequences", out)

    def test_greedy_generate(self) -> None:
        """As many tokens as asked, behind the prompt as it was."""
        out, _, inputs = self._written(do_sample=False)
        prompt = inputs["input_ids"]
        assert out.shape == (len(prompt), prompt.shape[1] + NEW)
        assert torch.equal(out[:, : prompt.shape[1]], prompt)

    def test_greedy_generate_dict_outputs(self) -> None:
        """Scores, hidden states and attentions, one a step."""
        out, _, inputs = self._written(
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
            output_hidden_states=True,
            output_attentions=True,
        )
        assert len(out.scores) == len(out.logits) == NEW
        assert len(out.hidden_states) == NEW
        assert torch.equal(out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.scores, 1).argmax(-1))

    def test_greedy_generate_with_and_without_cache(self) -> None:
        """The cache changes nothing."""
        cached, _, _ = self._written(do_sample=False)
        plain, _, _ = self._written(do_sample=False, use_cache=False)
        assert torch.equal(cached, plain)

    def test_sample_generate(self) -> None:
        """Sampling with the settings that checkpoints ship, twice alike under one seed."""
        settings = {"do_sample": True, "top_k": 20, "top_p": 0.8, "temperature": 0.7, "repetition_penalty": 1.05}
        assert torch.equal(self._written(**settings)[0], self._written(**settings)[0])

    def test_sample_generate_several(self) -> None:
        """Several answers a row."""
        out, _, inputs = self._written(do_sample=True, num_return_sequences=3)
        assert len(out) == 3 * len(inputs["input_ids"])

    def test_beam_search_generate(self) -> None:
        """Beams, with and without a cache."""
        out, _, inputs = self._written(do_sample=False, num_beams=3)
        assert len(out) == len(inputs["input_ids"])
        assert torch.equal(out, self._written(do_sample=False, num_beams=3, use_cache=False)[0])

    def test_beam_sample_generate(self) -> None:
        """Beams that sample."""
        out, _, inputs = self._written(do_sample=True, num_beams=2, num_return_sequences=2)
        assert len(out) == 2 * len(inputs["input_ids"])

    def test_assisted_decoding_matches_greedy(self) -> None:
        """A model that assists itself writes what it writes alone."""
        model, inputs = self._made()
        rows = {name: value[: len(value) // 2] for name, value in inputs.items()}
        options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
        alone = model.generate(**rows, **options)
        assistant = self._made()[0]
        assert torch.equal(alone, model.generate(**rows, **options, assistant_model=assistant))

    def test_prompt_lookup_matches_greedy(self) -> None:
        """Tokens guessed from the prompt change nothing."""
        model, inputs = self._made()
        rows = {name: value[: len(value) // 2] for name, value in inputs.items()}
        options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
        assert torch.equal(
            model.generate(**rows, **options), model.generate(**rows, **options, prompt_lookup_num_tokens=2)
        )

    def test_left_padding_compatibility(self) -> None:
        """A row padded on the left is the row."""
        model, inputs = self._made()
        logits = model(**inputs).logits[:, -1]
        padded = dict(inputs)
        for name, value in (("input_ids", 0), ("attention_mask", 0), ("mm_token_type_ids", 0)):
            if name in padded:
                padded[name] = torch.nn.functional.pad(padded[name], (3, 0), value=value)
        torch.testing.assert_close(model(**padded).logits[:, -1], logits, atol=1e-5, rtol=1e-5)

    def test_past_key_values_format(self) -> None:
        """A cache with an entry a layer, as many positions as were read and written but one."""
        out, model, inputs = self._written(do_sample=False, return_dict_in_generate=True)
        cache = next(value for value in out.values() if isinstance(value, DynamicCache))
        text = model.config.get_text_config()
        assert len(cache) == text.num_hidden_layers
        assert len(cache.layers) == text.num_hidden_layers
        length = inputs["input_ids"].shape[1] + NEW - 1
        for layer in cache.layers:
            assert layer.keys.shape[:3] == (len(inputs["input_ids"]), text.num_key_value_heads, length)

    def test_generate_continue_from_past(self) -> None:
        """Written in two parts is written in one."""
        model, inputs = self._made()
        options = {"do_sample": False, "return_dict_in_generate": True}
        whole = model.generate(**inputs, max_new_tokens=NEW, min_new_tokens=NEW, **options)
        half = model.generate(**inputs, max_new_tokens=NEW // 2, min_new_tokens=NEW // 2, **options)
        cache = next((name, value) for name, value in half.items() if isinstance(value, DynamicCache))
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, NEW // 2), value=1)
        more = {"input_ids": half.sequences, "attention_mask": mask}
        if "mm_token_type_ids" in inputs:
            more["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, NEW // 2))
        rest = NEW - NEW // 2
        for name in ("image_grid_thw",):
            if name in inputs:
                more[name] = inputs[name]
        again = model.generate(**more, **{cache[0]: cache[1]}, max_new_tokens=rest, min_new_tokens=rest, **options)
        assert torch.equal(again.sequences, whole.sequences)

    def test_generate_with_static_cache(self) -> None:
        """A cache of fixed size changes nothing."""
        dynamic, _, _ = self._written(do_sample=False)
        static, _, _ = self._written(do_sample=False, cache_implementation="static", disable_compile=True)
        assert torch.equal(dynamic, static)

    def test_static_cache_given(self) -> None:
        """The same, with a cache that the caller has made."""
        model, inputs = self._made()
        dynamic, _, _ = self._written(do_sample=False)
        cache = StaticCache(config=model.config, max_cache_len=inputs["input_ids"].shape[1] + NEW)
        given = cache_argument(model, cache)
        out = model.generate(**inputs, **given, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
        assert torch.equal(dynamic, self._ids(out))

    def test_generate_from_inputs_embeds(self) -> None:
        """Embeddings in place of the ids of words and placeholders, pixels beside them."""
        model, inputs = self._made()
        given = dict(inputs)
        embeds = model.get_input_embeddings()(given.pop("input_ids"))
        options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
        whole = model.generate(**inputs, **options)
        out = model.generate(inputs_embeds=embeds, **given, **options)
        assert torch.equal(out, whole[:, -NEW:])

    def test_constrained_tokens(self) -> None:
        """What is suppressed is not written."""
        out, _, inputs = self._written(do_sample=False)
        first = out[0, inputs["input_ids"].shape[1]].item()
        again, _, _ = self._written(do_sample=False, suppress_tokens=[first])
        assert first not in again[:, inputs["input_ids"].shape[1] :]

    def test_a_row_alone(self) -> None:
        """The first row of a batch is that row."""
        model, inputs = self._made()
        options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
        rows = len(inputs["input_ids"])
        one = {name: value[: len(value) // rows] for name, value in inputs.items()}
        assert torch.equal(model.generate(**inputs, **options)[:1], model.generate(**one, **options))
