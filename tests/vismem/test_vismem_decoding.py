"""Whatever way tokens are generated, the result is that of one uncached forward with the same latents in place."""

import threading

import torch
from families import Row, make_inputs
from vismem_helpers import BY_NAME, CLOSE, PLAN, ROWS, WordsAndMemory, at_choices, built, forced, generate, uncached

from keepsight.vismem import MemoryPolicy, Replay, RolloutOptions, VisMemBranch


def assert_is_uncached(model, inputs, out):
    cached = torch.stack(out.logits, 1)
    torch.testing.assert_close(at_choices(out, cached), at_choices(out, uncached(model, inputs, out)), **CLOSE)


def test_ragged_batch_equals_one_uncached_forward(any_name):
    model, inputs = built(any_name)
    out = generate(model, inputs, memory=forced())
    assert [[i.kind for i in row] for row in out.invocations] == [["long"], ["short", "long"], []]
    assert_is_uncached(model, inputs, out)
    blank = [[] for _ in out.invocations]
    for row, found in zip(blank, out.invocations, strict=True):
        for i in found:
            row.append(type(i)(**{**i.__dict__, "latents": torch.zeros_like(i.latents)}))
    cached, wrong = (
        torch.stack(out.logits, 1),
        uncached(model, inputs, type(out)(sequences=out.sequences, invocations=blank)),
    )
    after = out.invocations[0][0].position - inputs["input_ids"].shape[1] + 7
    assert (cached[0, after:] - wrong[0, after:]).abs().max() > 1e-2  # the latents matter


def test_batch_equals_its_rows(name):
    model, inputs = built(name)
    together = generate(model, inputs, memory=forced())
    prompt = inputs["input_ids"].shape[1]
    for i, row in enumerate(ROWS):
        alone_inputs = make_inputs(BY_NAME[name], model, [row])
        alone = generate(model, alone_inputs, memory=forced([PLAN[i]]))
        assert (
            alone.sequences[0, alone_inputs["input_ids"].shape[1] :].tolist() == together.sequences[i, prompt:].tolist()
        )
        for a, b in zip(alone.invocations[0], together.invocations[i], strict=True):
            torch.testing.assert_close(a.latents, b.latents, **CLOSE)


def test_log_probs_of_a_rollout_are_those_of_one_forward(name):
    """What a trainer recomputes: log-probabilities with every ban in the normaliser, from one forward."""
    model, inputs = built(name)
    with torch.no_grad():
        VisMemBranch.of(model).active.rows.invoke_bias.fill_(1.5)
    torch.manual_seed(1)
    out = generate(model, inputs, n=40, memory="free", do_sample=True, top_k=0, output_scores=True)
    assert any(out.invocations)
    scores = WordsAndMemory()(None, uncached(model, inputs, out).flatten(0, 1)).view(*out.sampled.shape, -1)
    short, short_end, long, long_end = VisMemBranch.of(model).config.token_ids
    scores[..., [short_end, long_end]] = -torch.inf
    for column, invoke in enumerate((short, long)):
        scores[..., invoke] = scores[..., invoke].masked_fill(~out.allowed[..., column], -torch.inf)
    chosen = out.sequences[:, inputs["input_ids"].shape[1] :, None]
    rollout, again = (s.log_softmax(-1).gather(-1, chosen)[..., 0] for s in (torch.stack(out.scores, 1), scores))
    torch.testing.assert_close(at_choices(out, again), at_choices(out, rollout), **CLOSE)


def test_static_cache_equals_dynamic(name):
    model, inputs = built(name)
    dynamic = generate(model, inputs, memory=forced())
    static = generate(model, inputs, memory=forced(), cache_implementation="static", disable_compile=True)
    assert static.sequences.tolist() == dynamic.sequences.tolist()


def test_off_is_plain_generation(name):
    model, inputs = built(name)
    base = BY_NAME[name].build()
    for do_sample in (False, True):
        options = {"max_new_tokens": 8, "do_sample": do_sample}
        tokens = []
        for anyone, more in ((base, {}), (model, {"memory": "off"})):
            torch.manual_seed(0)
            tokens.append(anyone.generate(**inputs, **options, **more).tolist())
        with model.disable_adapter():
            torch.manual_seed(0)
            tokens.append(model.generate(**inputs, **options).tolist())
        assert tokens[0] == tokens[1] == tokens[2]


def test_sampling_several_sequences(name):
    BY_NAME[name].skip_wrong_copies()
    rows = [Row(3, (1, 2), 4, seed=1), Row(1, (2, 2), 5, seed=2)]
    model, inputs = built(name, rows)
    torch.manual_seed(0)
    plan = [{k % 3: "short", 6: "long"} for k in range(6)]
    out = generate(model, inputs, do_sample=True, num_return_sequences=3, memory=forced(plan))
    assert len({tuple(s) for s in out.sequences.tolist()}) > 2
    longer = make_inputs(BY_NAME[name], model, [row for row in rows for _ in range(3)])
    assert_is_uncached(model, longer, out)


def test_replay_then_same_other_and_no_memory(name):
    model, inputs = built(name, [Row(1, (2, 2), 5, seed=2)])
    first = generate(model, inputs, memory=forced([{2: "short", 5: "long"}]))
    prompt = inputs["input_ids"].shape[1]
    second = first.invocations[0][1]
    prefix = first.sequences[0, prompt : second.position + 1]
    replay = [Replay(prefix, first.invocations[0][0].latents)]
    again = generate(model, inputs, memory=MemoryPolicy("free", max_invocations=2), rollout=RolloutOptions(replay))
    assert again.sequences.tolist() == first.sequences.tolist()
    torch.testing.assert_close(again.invocations[0][0].latents, second.latents, **CLOSE)
    other = generate(model, inputs, memory=MemoryPolicy("reversed", max_invocations=2), rollout=RolloutOptions(replay))
    assert [(i.kind, i.invoked_as) for i in other.invocations[0]] == [("short", "long")]
    without = [Replay(prefix[:-1], first.invocations[0][0].latents)]
    none = generate(model, inputs, memory=MemoryPolicy("free", max_invocations=1), rollout=RolloutOptions(without))
    assert none.invocations[0] == []
    assert none.sequences[0, : second.position].tolist() == first.sequences[0, : second.position].tolist()


def test_end_of_text_in_one_row_while_another_writes_memory(name):
    model, inputs = built(name)
    plain = generate(model, inputs, memory=forced())
    prompt = inputs["input_ids"].shape[1]
    eos = plain.sequences[2, prompt + 4].item()
    out = generate(model, inputs, memory=forced([{3: "long"}, {4: "long"}, {}]), eos_token_id=eos, pad_token_id=0)
    row = out.sequences[2, prompt:].tolist()
    end = row.index(eos)
    assert set(row[end + 1 :]) <= {0}
    for i, found in enumerate(out.invocations):
        for invocation in found:
            stop = invocation.position + len(invocation.latents) + 2
            assert out.sequences[i, stop - 1].item() in (129, 131)


def test_grammar_under_free_sampling(name):
    model, inputs = built(name)
    torch.manual_seed(0)
    out = generate(
        model, inputs, n=60, do_sample=True, temperature=2.0, top_k=0, memory=MemoryPolicy("free", max_invocations=3)
    )
    lengths = {128: 4, 130: 5}
    for row, found in zip(out.sequences[:, inputs["input_ids"].shape[1] :].tolist(), out.invocations, strict=True):
        seen, i = 0, 0
        while i < len(row):
            assert row[i] not in (129, 131)  # an end token never stands by itself
            if row[i] in lengths:
                n = lengths[row[i]]
                assert row[i + 1 : i + 2 + n] == [row[i] + 1] * (n + 1)
                i, seen = i + n + 1, seen + 1
            i += 1
        assert seen == len(found) <= 3
        assert row[-1] not in (*lengths, 129, 131)  # something is written after the last memory
    assert sum(map(len, out.invocations)) > 0


def test_two_threads(name):
    model, inputs = built(name)
    plans = [forced(), forced([{2: "short"}, {2: "long"}, {1: "long"}])]
    expected = [generate(model, inputs, memory=plan).sequences.tolist() for plan in plans]
    found: list = [None, None]

    def work(i):
        for _ in range(3):
            found[i] = generate(model, inputs, memory=plans[i]).sequences.tolist()

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected
