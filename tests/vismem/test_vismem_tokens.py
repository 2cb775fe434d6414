"""Tokens, policies, guards, warnings, and what people see of memories in text."""

import warnings

import pytest
import torch
from families import Row, make_inputs
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from transformers import DynamicCache, PreTrainedTokenizerFast, TextStreamer
from vismem_helpers import BY_NAME, CLOSE, ROWS, at_choices, attach, built, forced, generate, strengthen, uncached

import keepsight
from keepsight.compat import cache_argument
from keepsight.errors import KeepsightWarning
from keepsight.vismem import MemoryPolicy, VisMemBranch, VisMemConfig, add_memory_tokens, decode
from keepsight.vismem.tokens import MemoryTokens

SPARE = [116, 120 - 1, 117, 118]  # ids inside the tiny models' vocabulary


@pytest.fixture
def reference():
    """The shipped model with a memory whose tokens stand in its tokenizer, and a text prompt."""
    model, processor = keepsight.load("keepsight/reference")
    model = attach(model)
    add_memory_tokens(processor, model)
    return model, processor, dict(processor.tokenizer("hello", return_tensors="pt"))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ids", [None, SPARE])
def test_rows_leave_the_base_alone(name, tied, ids):
    """Tied or untied, spare rows or none: new rows are seen and trained, the base's matrices never change."""
    family = BY_NAME[name]
    base = family.build(tie_word_embeddings=tied).requires_grad_(False)  # as adapters freeze it
    if tied:
        base.tie_weights()
    inputs = make_inputs(family, base, [Row((2, 2), 4, seed=1)])
    start = {k: v.clone() for k, v in base.state_dict().items()}
    with torch.no_grad():
        plain = base(**inputs).logits
    model = attach(base, token_ids=ids)
    branch = VisMemBranch.of(model)
    rows = branch.active.rows
    assert (rows.invoke_head is None) == (base.get_output_embeddings().weight is base.get_input_embeddings().weight)
    where = branch.config.token_ids
    out = model(**inputs)
    others = [i for i in range(plain.shape[-1]) if i not in where]
    assert torch.equal(out.logits[..., others], plain[..., others])
    assert out.logits.shape[-1] == max(plain.shape[-1], max(where) + 1)
    longer = dict(inputs)
    longer["input_ids"] = inputs["input_ids"].clone()
    longer["input_ids"][0, -2] = where[2]
    embedded = base.get_input_embeddings()(longer["input_ids"])[0, -2]
    assert torch.equal(embedded, rows.invoke_embedding[1] * branch.embedding_scale)
    labels = longer["input_ids"]
    model(**longer, labels=labels).loss.backward()
    assert rows.invoke_embedding.grad.abs().max() > 0
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert all(torch.equal(base.state_dict()[k], v) for k, v in start.items())


def test_a_tokenizer_without_the_first_delimiter_has_the_others(reference):
    """A tokenizer of words has nothing for a line break, or makes nothing of it."""
    _, processor, _ = reference
    find = keepsight.vismem.processor.find_delimiters
    full_stop = processor.tokenizer.convert_tokens_to_ids(".")
    assert processor.tokenizer.encode("\n", add_special_tokens=False) == []
    with pytest.warns(KeepsightWarning, match=r"no token for the delimiter '\\n', so invocation tokens start as '\.'"):
        assert find(processor.tokenizer, ["\n", "."]) == [full_stop]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find(processor.tokenizer, VisMemConfig().delimiters)  # nobody chose them
        assert find(processor.tokenizer, [".", "\n"]) == [full_stop]


def test_loss_equals_the_bases_own():
    """Without the new tokens in it, and with their logits shut, the loss is transformers' own."""
    base = BY_NAME["qwen3_vl"].build()
    inputs = make_inputs(BY_NAME["qwen3_vl"], base, [Row((2, 2), 4, seed=1)])
    labels = inputs["input_ids"]
    plain = base(**inputs, labels=labels).loss
    model = attach(base)
    with torch.no_grad():
        rows = VisMemBranch.of(model).active.rows
        rows.invoke_head.zero_(), rows.end_head.zero_(), rows.invoke_bias.fill_(-1e4)
        more = model(**inputs, labels=labels).loss
    logits = model(**inputs).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(more, expected)
    assert (more - plain).abs() < 0.1  # two end tokens more in the denominator


def test_tokens_are_added_once_with_a_delimiters_rows():
    model, processor = keepsight.load("keepsight/reference")
    tokenizer, size = processor.tokenizer, len(processor.tokenizer)
    config = VisMemConfig(num_queries=2, num_short=2, num_long=2, perturbation=0.01)
    before = add_memory_tokens(processor, config)
    assert len(tokenizer) == size + 4
    assert list(before.values()) == config.token_ids == list(range(size, size + 4))
    assert all(tokenizer.added_tokens_decoder[i].special for i in before.values())
    from peft import get_peft_model

    model = get_peft_model(model, config)
    again = add_memory_tokens(processor, model)
    assert again == before
    assert len(tokenizer) == size + 4
    rows = VisMemBranch.of(model).active.rows
    delimiter = model.get_input_embeddings().weight[config.delimiter_ids[0]]
    for row in rows.embedding:
        assert 0 < (row - delimiter).norm() < 0.1 * delimiter.norm()
    assert tokenizer.decode(config.delimiter_ids[0]).strip() in config.delimiters
    text = f"a{config.token_names[0]}b"
    assert config.token_ids[0] in tokenizer(text)["input_ids"]  # indivisible


def test_another_tokenizer_is_refused(reference):
    model, _, _ = reference
    _, other = keepsight.load("keepsight/reference")
    other.tokenizer.add_tokens(["<|mine|>"])
    with pytest.raises(keepsight.KeepsightError, match="saved with the adapter"):
        add_memory_tokens(other, model)


def test_decoding_hides_memory_by_default(reference):
    model, processor, inputs = reference
    out = generate(model, inputs, memory=forced({2: "long"}), logits_processor=None)
    names = VisMemBranch.of(model).config.token_names
    hidden = decode(processor, out, model)[0]
    assert not any(n in hidden for n in names)
    shown = decode(processor, out, model, show_memory=True)[0]
    assert f"{names[2]}[5 latents]{names[3]}" in shown
    assert shown.replace(f"{names[2]}[5 latents]{names[3]}", "").replace(" ", "") == hidden.replace(" ", "")
    usual = processor.batch_decode(out.sequences, skip_special_tokens=True)[0]
    assert not any(n in usual for n in names)


def test_streamer_shows_text_only(reference, capsys):
    model, processor, inputs = reference
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True)
    out = generate(model, inputs, memory=forced({2: "long"}), logits_processor=None, streamer=streamer)
    ids = out.sequences[:, inputs["input_ids"].shape[1] :]
    assert capsys.readouterr().out.strip() == decode(processor, ids, model)[0].strip()


def characters():
    """A tokenizer of single characters, as many as the tiny models have words."""
    core = Tokenizer(BPE(vocab={chr(33 + i): i for i in range(128)}, merges=[]))
    core.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="!")


def test_stop_strings_see_the_text_without_memory():
    model, inputs = built("qwen3_vl", [Row(1, (2, 2), 5, seed=2)])
    tokenizer, prompt = characters(), inputs["input_ids"].shape[1]
    assert list(add_memory_tokens(tokenizer, model).values()) == [128, 129, 130, 131]
    plan = forced([{3: "long"}])
    options = {"memory": plan, "do_sample": True, "tokenizer": tokenizer}
    torch.manual_seed(0)
    whole = generate(model, inputs, **options)
    words = whole.sequences[0, prompt:]
    words = words[words < 128]
    stop = tokenizer.decode(words[2:5]).replace(" ", "")  # begins before the memory, ends after it
    torch.manual_seed(0)
    out = generate(model, inputs, stop_strings=[stop], **options)
    assert out.sequences.tolist() == whole.sequences[:, : prompt + 5 + 7].tolist()
    with pytest.raises(keepsight.KeepsightError, match="tokenizer="):
        generate(model, inputs, memory=plan, stop_strings=[stop])


def test_several_scores_and_the_record(name):
    model, inputs = built(name)
    out = generate(model, inputs, memory=forced(), output_scores=True)
    new = out.sequences.shape[1] - inputs["input_ids"].shape[1]
    assert len(out.scores) == len(out.logits) == new
    assert out.sampled.shape == (3, new)
    assert out.allowed.shape == (3, new, 2)
    transitions = torch.stack(out.scores, 1).log_softmax(-1)
    chosen = transitions.gather(-1, out.sequences[:, -new:, None])[..., 0]
    assert chosen.isfinite().all()
    assert (chosen[~out.sampled] == 0).all()
    for row, found in enumerate(out.invocations):
        for i in found:
            ids = out.sequences[row, i.position : i.position + len(i.latents) + 2].tolist()
            invoke, end = {"short": (128, 129), "long": (130, 131)}[i.kind]
            assert ids == [invoke] + [end] * (len(i.latents) + 1)
            assert not i.was_sampled
            assert i.formation.text.shape[1] == i.latents.shape[1] == 64


def test_model_decides_and_other_policies(name):
    """A model that loves one type: free, only_*, reversed."""
    model, inputs = built(name, [Row(1, (2, 2), 5, seed=2), Row(7, seed=3)])
    with torch.no_grad():
        VisMemBranch.of(model).active.rows.invoke_bias.copy_(torch.tensor([50.0, 40.0]))

    def kinds(out):
        return [[(i.kind, i.invoked_as, i.was_sampled) for i in row] for row in out.invocations]

    free = generate(model, inputs, memory=MemoryPolicy("free", max_invocations=2))
    assert kinds(free)[0] == [("short", "short", True)] * 2
    assert kinds(free)[1] == [("long", "long", True)] * 2  # no short-term memory without an image
    assert at_choices(free, free.allowed).shape[-1] == 2
    torch.testing.assert_close(
        at_choices(free, torch.stack(free.logits, 1)), at_choices(free, uncached(model, inputs, free)), **CLOSE
    )
    only = generate(model, inputs, memory=MemoryPolicy("only_long", max_invocations=1))
    assert kinds(only) == [[("long", "long", True)]] * 2
    only = generate(model, inputs, memory="only_short")
    assert {k for k, _, _ in kinds(only)[0]} == {"short"}
    assert kinds(only)[1] == []
    turned = generate(model, inputs, memory=MemoryPolicy("reversed", max_invocations=1))
    assert kinds(turned)[0] == [("long", "short", True)]
    assert kinds(turned)[1] == [("long", "short", True)]
    config = VisMemBranch.of(model).config
    config.policy, config.max_invocations = "only_long", 1  # the config's policy is the default
    assert kinds(generate(model, inputs)) == kinds(generate(model, inputs, memory="only_long"))


def test_random_policy(name):
    model, inputs = built(name, [Row(1, (2, 2), 5, seed=2), Row(7, seed=3)])
    config = VisMemBranch.of(model).config
    with pytest.raises(keepsight.KeepsightError, match="add_memory_tokens"):
        generate(model, inputs, memory="random")
    config.delimiter_ids = list(range(5, 60))
    torch.manual_seed(2)
    out = generate(model, inputs, n=240, do_sample=True, memory=MemoryPolicy("random", probability=0.5))
    assert {i.kind for i in out.invocations[0]} == {"short", "long"}
    assert {i.kind for i in out.invocations[1]} == {"long"}
    for row, found in enumerate(out.invocations):
        for i in found:
            assert out.sequences[row, i.position - 1].item() in config.delimiter_ids
    never = generate(model, inputs, n=60, do_sample=True, memory=MemoryPolicy("random", probability=0.0))
    assert never.invocations == [[], []]


def test_guards(name):
    model, inputs = built(name, [Row(1, (2, 2), 5, seed=2)])
    with torch.no_grad():
        VisMemBranch.of(model).active.rows.invoke_bias.fill_(1e4)  # would invoke for ever
    out = generate(model, inputs, n=40, memory=MemoryPolicy("free", max_invocations=3))
    assert len(out.invocations[0]) == 3
    for n in range(1, 20):  # never half a memory, whatever the room
        out = generate(model, inputs, n=n, memory="free")
        used = sum(len(i.latents) + 2 for i in out.invocations[0])
        assert used < n or used == 0
        assert int(MemoryTokens([128, 129, 130, 131]).memory_mask(out.sequences).sum()) == used


def test_repetition_penalty_spares_memory(name):
    """Invoking once makes nothing less likely, invoking again and ending the text included; n-grams are the text's."""
    model, inputs = built(name, [Row(1, (2, 2), 5, seed=2)])
    seen = []

    def look(ids, scores):
        seen.append(ids[0].tolist())
        return scores

    prompt = inputs["input_ids"].shape[1]
    options = {"memory": forced([{1: "long"}]), "pad_token_id": 1, "eos_token_id": 1}
    out = generate(model, inputs, logits_processor=[look], **options)
    assert len(seen) > 8
    tokens = VisMemBranch.of(model).tokens
    never_chosen = set(tokens.end.values())
    for ids in seen:
        assert not set(ids[prompt:]) & {1, *tokens.invoke.values()}
        text = [i for i in ids[prompt:] if i not in never_chosen]
        assert ids == ids[:prompt] + ids[prompt : len(ids) - len(text)] + text  # in one piece
    text = out.sequences[0, prompt:][~tokens.memory_mask(out.sequences[0, prompt:])].tolist()
    assert text[:-1] == [i for i in seen[-1][prompt:] if i not in never_chosen]
    # The penalty of transformers' own: what it makes of the raw logits is the same as if there were no memory.
    out = generate(model, inputs, repetition_penalty=5.0, output_scores=True, **options)
    raw, processed = out.logits[-1][0], out.scores[-1][0]
    written = set(out.sequences[0, :-1].tolist()) - set(tokens.ids)
    changed = {i for i in range(len(raw)) if 5 <= i < 115 and raw[i] != processed[i]}
    assert changed == {i for i in written if 5 <= i < 115}


def test_what_is_refused(name):
    model, inputs = built(name, [Row(1, (2, 2), 5, seed=2)])
    calls = []
    model.get_base_model().register_forward_pre_hook(lambda *a: calls.append(1))
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), 0)
    for options, message in [
        ({"num_beams": 2}, "num_beams=2"),
        ({"assistant_model": model}, "assisted decoding"),
        ({"prompt_lookup_num_tokens": 2}, "assisted decoding"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"use_cache": False}, "KV cache"),
        ({"output_attentions": True}, "not collected"),
        ({"output_hidden_states": True}, "not collected"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size"),
        ({"custom_generate": print}, "custom_generate"),
        ({"force_words_ids": [[40]]}, "force_words_ids"),
        ({"use_mtp": True}, "assisted decoding"),
        ({"cache_implementation": "paged"}, "continuous batching"),
        (cache_argument(model, cache), "already holds a prompt"),
        ({"memory": "sometimes"}, "expected one of"),
        ({"memory": "forced"}, "names the places"),
    ]:
        with pytest.raises(keepsight.KeepsightError, match=message):
            generate(model, inputs, **options)
    assert not calls  # before any work
    for policy in ({"name": "free", "at": {0: "long"}}, {"name": "forced", "at": {0: "wide"}}, {"probability": 0.5}):
        with pytest.raises(keepsight.KeepsightError):
            MemoryPolicy(**policy)
    with pytest.raises(keepsight.KeepsightError, match="2 entries for 1 rows"):
        generate(model, inputs, memory=forced([{}, {}]))
    with pytest.raises(keepsight.KeepsightError, match="carries no VisMem"):
        VisMemBranch.of(BY_NAME[name].build())


def test_what_has_no_effect_or_is_noise_is_a_warning():
    from peft import get_peft_model

    family = BY_NAME["qwen3_vl"]
    base = family.build()
    inputs = make_inputs(family, base, ROWS)
    model = get_peft_model(base, VisMemConfig(num_queries=2, num_short=2, num_long=2))
    with pytest.warns(keepsight.KeepsightWarning, match="never trained: its memories are noise"):
        model.generate(**inputs, max_new_tokens=8, memory=forced({0: "long"}))
    strengthen(model)
    rows = VisMemBranch.of(model).active.rows
    with torch.no_grad():
        rows.invoke_embedding.copy_(rows.start)
    rows.invoke_bias.data.zero_()
    with pytest.warns(keepsight.KeepsightWarning, match="invocation tokens were never trained"):
        model.generate(**inputs, max_new_tokens=2)
    with pytest.warns(keepsight.KeepsightWarning, match="were not invoked"):
        model.generate(**inputs, max_new_tokens=8, memory=forced({30: "long"}))
    with model.disable_adapter(), pytest.warns(keepsight.KeepsightWarning, match="no VisMem adapter is active"):
        model.generate(**inputs, max_new_tokens=2, memory="free")


def test_plain_tensor_without_a_dict(name):
    model, inputs = built(name)
    out = model.generate(**inputs, max_new_tokens=10, do_sample=False, memory=forced({1: "long"}))
    assert torch.is_tensor(out)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 10
