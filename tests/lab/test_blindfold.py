"""The blindfold: text cannot see images, the memory can, and nothing is left behind."""

import threading

import pytest
import torch
from families import BY_NAME, FAMILIES, Row, make_inputs
from helpers import MIXED_ROWS, attach, logits

from keepsight.backbone import Backbone
from keepsight.compat import cache_argument, enable_checkpointing, find_output_cache
from keepsight.train.pvm.blindfold import (
    BlindfoldError,
    BlindfoldSchedule,
    SightLosses,
    blindfold,
    blindfold_callback,
    blindfold_mask,
)

COVERABLE = [family for family in FAMILIES if not family.hybrid]
ONE_IMAGE = [Row(2, (2, 2), 5, seed=1), Row(3, (2, 2), 4, seed=2)]


@pytest.fixture(params=COVERABLE, ids=lambda family: family.name)
def coverable(request):
    return request.param


def text_logits(model, inputs):
    """Logits of all text positions that are no padding, [n, V]."""
    keep = inputs["attention_mask"].bool() & ~Backbone.of(model).visual_mask(inputs["input_ids"])
    return logits(model, inputs, use_cache=False)[keep]


def with_other_pixels(inputs):
    return inputs | {"pixel_values": inputs["pixel_values"].flip(-1) + 1.0}


def test_text_cannot_see_the_image(coverable):
    model = coverable.build()
    inputs = make_inputs(coverable, model, MIXED_ROWS)
    assert not torch.equal(text_logits(model, inputs), text_logits(model, with_other_pixels(inputs)))
    with blindfold(model):
        assert torch.equal(text_logits(model, inputs), text_logits(model, with_other_pixels(inputs)))


def test_the_memory_still_sees_the_image(coverable):
    model = coverable.build()
    inputs = make_inputs(coverable, model, MIXED_ROWS)
    model = attach(model)
    with blindfold(model):
        difference = text_logits(model, inputs) - text_logits(model, with_other_pixels(inputs))
    assert difference.abs().max() > 1e-3


def test_rows_without_images_and_visual_positions_are_untouched(coverable):
    model = coverable.build()
    for rows, is_free in ((ONE_IMAGE, "visual"), ([Row(7, seed=3), Row(4, seed=4)], "text")):
        inputs = make_inputs(coverable, model, rows)
        visual = Backbone.of(model).visual_mask(inputs["input_ids"])
        keep = visual if is_free == "visual" else inputs["attention_mask"].bool()
        plain = logits(model, inputs, use_cache=False)
        with blindfold(model):
            covered = logits(model, inputs, use_cache=False)
        torch.testing.assert_close(covered[keep], plain[keep], rtol=0, atol=2e-5)


def test_a_batch_equals_its_rows(coverable):
    model = attach(coverable.build())
    rows = [*ONE_IMAGE, Row(1, (2, 2), 2, seed=5)]
    inputs = make_inputs(coverable, model, rows)
    with blindfold(model):
        together = logits(model, inputs, use_cache=False)
        for index, row in enumerate(rows):
            alone = logits(model, make_inputs(coverable, model, [row]), use_cache=False)[0]
            torch.testing.assert_close(together[index, -len(alone) :], alone, rtol=0, atol=2e-5)


def test_nothing_is_left_behind(coverable):
    model = attach(coverable.build())
    inputs = make_inputs(coverable, model, MIXED_ROWS)
    before = logits(model, inputs, use_cache=False)
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(RuntimeError, match="on purpose"), blindfold(model):  # noqa: PT012
        logits(model, inputs, use_cache=False)
        raise RuntimeError("on purpose")
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert torch.equal(logits(model, inputs, use_cache=False), before)


def test_gradient_checkpointing_changes_nothing(coverable):
    model = attach(coverable.build()).train()
    inputs = make_inputs(coverable, model, ONE_IMAGE)

    def gradients():
        model.zero_grad()
        with blindfold(model):
            model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    enable_checkpointing(model)
    again = gradients()
    assert plain.keys() == again.keys()
    assert any(g.abs().sum() > 0 for g in plain.values())
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_the_backward_may_come_after_the_block():
    """Recomputation under gradient checkpointing uses the mask of its own forward."""
    family = BY_NAME["qwen3_vl"]
    model = attach(family.build()).train()
    inputs = make_inputs(family, model, ONE_IMAGE)

    def gradients(late):
        model.zero_grad()
        with blindfold(model):
            loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
            if not late:
                loss.backward()
        if late:
            loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    enable_checkpointing(model)
    early, late = gradients(False), gradients(True)
    assert all(torch.equal(early[name], late[name]) for name in early)


def test_other_threads_see():
    family = BY_NAME["qwen3_vl"]
    model = family.build()
    inputs = make_inputs(family, model, ONE_IMAGE)
    plain = logits(model, inputs, use_cache=False)
    elsewhere = []
    with blindfold(model):
        thread = threading.Thread(target=lambda: elsewhere.append(logits(model, inputs, use_cache=False)))
        thread.start()
        thread.join()
        covered = logits(model, inputs, use_cache=False)
    assert torch.equal(elsewhere[0], plain)
    assert not torch.equal(covered, plain)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.hybrid], ids=lambda family: family.name)
def test_linear_attention_cannot_be_covered(family):
    with pytest.raises(BlindfoldError, match=r"linear attention.*without the warm-up"), blindfold(family.build()):
        pass


def test_flash_attention_is_refused():
    model = BY_NAME["qwen3_vl"].build()
    Backbone.of(model).decoder.config._attn_implementation = "flash_attention_2"
    with pytest.raises(BlindfoldError, match="attn_implementation='sdpa'"), blindfold(model):
        pass


def test_sliding_windows_are_refused():
    model = BY_NAME["qwen2_5_vl"].build()
    text = Backbone.of(model).text_config
    text.layer_types = ["full_attention", "full_attention", "sliding_attention", "sliding_attention"]
    text.sliding_window = 4
    with pytest.raises(BlindfoldError, match="sliding windows"), blindfold(model):
        pass


@pytest.mark.parametrize("schedule", [None, BlindfoldSchedule(2, 0.0)], ids=["default", "given"])
def test_any_trainer_takes_it_as_a_callback(schedule, tmp_path):
    """Step by step, text sees the image where the schedule says so; evaluations always see; nothing is left behind."""
    from transformers import Trainer, TrainingArguments

    family = BY_NAME["qwen3_vl"]
    model = attach(family.build())
    inputs = make_inputs(family, model, ONE_IMAGE)
    row = {"image": 0}
    seen = []

    class Look(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            with model.disable_adapter(), torch.no_grad():
                same = torch.equal(text_logits(model, inputs), text_logits(model, with_other_pixels(inputs)))
            seen.append("b" if same else "s" if model.training else "e")
            return super().compute_loss(model, inputs, *args, **kwargs)

    arguments = TrainingArguments(
        str(tmp_path), max_steps=8, eval_strategy="steps", eval_steps=2, report_to="none", use_cpu=True, save_steps=99
    )
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    Look(
        model=model,
        args=arguments,
        train_dataset=[row] * 8,
        eval_dataset=[row],
        data_collator=lambda rows: inputs | {"labels": inputs["input_ids"]},
        callbacks=[blindfold_callback(schedule)],
    ).train()
    assert "".join(seen) == ("bbebsebsebse" if schedule is None else "bbessessesse")
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks


def test_continuing_a_cache_is_refused():
    family = BY_NAME["qwen3_vl"]
    model = family.build()
    inputs = make_inputs(family, model, ONE_IMAGE)
    cache = find_output_cache(model(**inputs, use_cache=True))
    with pytest.raises(BlindfoldError, match="continues a cache"), blindfold(model):
        model(input_ids=inputs["input_ids"][:, -1:], **cache_argument(model, cache))


def test_the_mask_keeps_what_a_given_mask_hides():
    visual = torch.tensor([[False, True, False, False]])
    hidden = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    hidden[..., 3, 0] = False
    additive = torch.zeros(1, 1, 4, 4).masked_fill(~hidden, float("-inf"))
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 1]]
    for given in (hidden, additive):
        mask = blindfold_mask(visual, given, torch.float32)
        assert (mask[0, 0] == 0).int().tolist() == expected
    padded = blindfold_mask(visual, torch.tensor([[0, 1, 1, 1]]), torch.float32)
    assert (padded[0, 0] == 0).int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 1 / 3, 0.5, 0.9])
@pytest.mark.parametrize("steps", [0, 1, 7])
def test_a_schedule_covers_the_warm_up_and_then_an_even_share(steps, share):
    schedule = BlindfoldSchedule(steps, share)
    assert all(schedule.covers(step) for step in range(steps))
    later = [schedule.covers(steps + step) for step in range(300)]
    for size in range(1, 301):  # at no time is the share off by a whole step
        assert abs(sum(later[:size]) - size * share) < 1 + 1e-9
    assert bool(schedule) == any(schedule.covers(step) for step in range(steps + 300))


def test_a_schedule_never_leaves_the_blindfold_on():
    for share in (1.0, 1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match="expected 0 to below 1"):
            BlindfoldSchedule(10, share)
    with pytest.raises(ValueError, match="expected 0"):
        BlindfoldSchedule(-1)


def test_losses_of_both_kinds_of_steps_are_kept_apart():
    losses = SightLosses()
    for step, blindfolded, parts in ((0, True, (1.0, 2.0)), (1, False, (0.25, 0.25)), (2, True, (0.5, 0.5))):
        for part in parts:  # micro-batches of one step
            losses.add(step, blindfolded, torch.tensor(part))
    assert losses.take(lambda value: value) == {"blindfolded_loss": 2.0, "sighted_loss": 0.5}
    assert losses.take(lambda value: value) == {}
