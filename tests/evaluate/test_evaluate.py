"""`keepsight eval`: off is the base, a batch is its rows, the table follows from the answers, bad input is refused."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from peft import get_peft_model
from typer.testing import CliRunner

import keepsight
from keepsight.cli import app
from keepsight.cli.eval import _show
from keepsight.data.answers import references
from keepsight.diagnose.cases import Sample, read_dataset
from keepsight.errors import KeepsightError, KeepsightWarning
from keepsight.evaluate.answering import Answer, Answerer, Question
from keepsight.evaluate.keeping import Kept, fingerprint
from keepsight.evaluate.run import EvalSettings, Evaluation, evaluate
from keepsight.evaluate.scoring import RULES, final_answer, is_right
from keepsight.lab.digits import CELLS, draw_grids


@pytest.fixture(scope="module")
def grids():
    images, digits = draw_grids(6, "test", np.random.default_rng(3))
    return images, digits


@pytest.fixture(scope="module", params=["PVM", "VisMem"])
def loaded(request):
    """A model with a memory that changes what it says."""
    if request.param == "VisMem":
        return keepsight.load("keepsight/reference-vismem")
    model, processor = keepsight.load("keepsight/reference")
    return get_peft_model(model, keepsight.PvmConfig(init_gate=3.0)), processor


def read_off(*images):
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": "read"}]
    return Question([{"role": "user", "content": content}], images)


def test_off_is_the_base_and_a_batch_is_its_rows(loaded, grids):
    images, _ = grids
    asked = [read_off(image) for image in images]
    asked += [read_off(*images[:2]), read_off()]
    base = Answerer(*keepsight.load("keepsight/reference")).answers(asked, 16)
    model, processor = loaded
    assert [a.text for a in Answerer(model, processor, "off").answers(asked, 16)] == [a.text for a in base]
    on = Answerer(model, processor)
    together = on.answers(asked, 16)
    assert together == [on.answers([one], 16)[0] for one in asked]
    assert [a.text for a in together] != [a.text for a in base]
    assert all(a.tokens <= 16 for a in together)


def test_table_follows_from_the_answers(grids):
    found = Evaluation(EvalSettings(strata=3, match="exact"), [("x",)] * 7, [], [])
    found.off = [Answer("x" if i % 2 else "y", 10 * (7 - i), 5) for i in range(7)]
    found.on = [Answer("x", 3, 5) for _ in range(7)]
    strata, whole = found.table()
    assert [s.n for s in strata] == [3, 2, 2]
    assert [(s.shortest, s.longest) for s in strata] == [(10, 30), (40, 50), (60, 70)]
    assert whole.off.value == pytest.approx(3 / 7)
    assert whole.on.value == 1
    assert whole.difference.value == pytest.approx(4 / 7)
    assert whole.difference.low <= whole.difference.value <= whole.difference.high
    assert sum(s.n * s.difference.value for s in strata) == pytest.approx(whole.n * whole.difference.value)


@pytest.mark.parametrize(
    ("lengths", "sizes"), [([8] * 6, [6]), ([8, 8, 8, 8, 8, 9], [6]), ([1, 2, 2, 2, 3, 4], [1, 3, 2])]
)
def test_answers_of_one_length_stay_together(lengths, sizes):
    found = Evaluation(EvalSettings(strata=3, match="exact"), [("x",)] * 6, [Answer("x", n, 5) for n in lengths])
    strata, _ = found.table()
    assert [s.n for s in strata] == sizes
    assert all(one.longest < other.shortest for one, other in pairwise(strata))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>2 or 3?</think><answer> 3 </answer>", "3"),
        ("so \\boxed{\\frac{1}{2}} and then some", "\\frac{1}{2}"),
        ("I think the answer is B.\nBecause of that.", "B."),
        ("seven", "seven"),
    ],
)
def test_the_answer_that_a_text_gives(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "reference", "match", "right"),
    [
        ("Answer: (B)", "B", "answer", True),
        ("The answer is 1,000.0", "1000", "answer", True),
        ("a black cat sat", "cat", "contains", True),
        ("concatenate", "cat", "contains", False),
        ("Cat", "cat", "exact", False),
        ("dog", ["cat", "dog"], "exact", True),
    ],
)
def test_right_or_wrong(text, reference, match, right):
    assert is_right(text, reference, match) is right


ANSWERS = {
    "docvqa": ["7", "seven"],
    "textvqa": ["seven", "7", "", "7"],
    "vqav2": [{"answer": "7", "answer_id": 1}, {"answer": "seven", "answer_id": 2}, {"answer": "7", "answer_id": 3}],
    "in a table": '["7", "seven"]',
    "numbers too": [7, "seven"],
}


@pytest.mark.parametrize("answers", ANSWERS.values(), ids=ANSWERS)
def test_any_of_several_references_counts(answers, grids, tmp_path):
    """From the file to the report; the one that is given to read is the most frequent."""
    grids[0][0].save(tmp_path / "0.png")
    (tmp_path / "q.jsonl").write_text(json.dumps({"image": "0.png", "question": "read", "answers": answers}) + "\n")
    with pytest.warns(KeepsightWarning, match="of several answers any is right"):
        (sample,) = read_dataset(tmp_path / "q.jsonl")
    assert sample.answer == "7"
    assert set(sample.references) == {"7", "seven"}
    for match in RULES:
        given = [Answer(text, 4, 9) for text in ("7", "seven", "8")]
        found = Evaluation(EvalSettings(match=match), [sample.references] * 3, given)
        assert found.right("off").tolist() == [True, True, False]
        found.save(tmp_path / "e.json")
        report = json.loads((tmp_path / "e.json").read_text())
        assert {"references": list(sample.references)}.items() <= report["answers"][1].items()
        assert report["rule"].startswith(f"{match}: ")
        assert report["rule"].endswith("any of the references counts (3 questions have several)")
    alone = Evaluation(EvalSettings(), [("7",)], given[:1])
    assert "references" not in alone.rule


@pytest.mark.parametrize(
    ("answer", "found"),
    [("[1, 2, 3, 4]", ("[1, 2, 3, 4]",)), ("[1, 2", ("[1, 2",)), (7, ("7",)), ([], ()), (None, ()), ([7], ("7",))],
)
def test_what_is_no_list_of_answers(answer, found):
    """A box in text is one answer."""
    assert references(answer) == found


def test_references_that_cannot_be_compared_are_named(tmp_path):
    for answers, word in (([1, 2, 3, 4], "or one .a box"), (["a", {"box": 3}], "expected text, found {'box'")):
        (tmp_path / "q.jsonl").write_text(json.dumps({"question": "read", "answers": answers}) + "\n")
        with pytest.raises(KeepsightError, match=rf"(?s)q.jsonl.*{word}"):
            read_dataset(tmp_path / "q.jsonl")


def test_what_cannot_be_asked_is_refused(grids):
    model, processor = keepsight.load("keepsight/reference")
    for memory, word in (("off", "carries no memory"), ("only_short", "policy of a VisMem"), ("never", "expected one")):
        with pytest.raises(KeepsightError, match=word):
            Answerer(model, processor, memory)
    for settings, word in (({"strata": 0}, "strata"), ({"match": "near"}, "match"), ({"memory": "off"}, "anyway")):
        with pytest.raises(KeepsightError, match=word):
            EvalSettings(**settings)
    with pytest.raises(KeepsightError, match="no answer to compare"):
        evaluate(model, processor, [Sample("read", tuple(grids[0][:1]))], EvalSettings(), False)


@pytest.mark.parametrize("asked", [1, 3, 4, 6])
def test_what_was_interrupted_goes_on_to_the_same_end(asked, grids, tmp_path):
    """With it or without it, and behind a line that was cut off."""
    model, processor = keepsight.load("keepsight/reference-vismem")
    samples = [Sample("read", (image,), answer="nine 9") for image in grids[0][:4]]
    settings = EvalSettings(max_new_tokens=6, batch_size=2)
    whole = evaluate(model, processor, samples, settings, True)
    file, key = tmp_path / "new" / "a.part", fingerprint(samples)
    kept = Kept(file, key)
    kept.add("on", whole.on[:asked])
    kept.add("off", whole.off[: max(asked - 4, 0)])
    with file.open("a") as lines:
        lines.write('{"memory": "o')
    asks = []
    again = Kept(file, key)
    resumed = evaluate(model, processor, samples, settings, True, lambda *told: asks.append(told), again)
    assert (resumed.on, resumed.off) == (whole.on, whole.off)
    assert len(asks) == -(-max(4 - asked, 0) // 2) + -(-(4 - max(asked - 4, 0)) // 2)
    assert (Kept(file, key).answers("on"), Kept(file, key).answers("off")) == (whole.on, whole.off)
    others = fingerprint([replace(one, also_right=("9",)) for one in samples])
    assert others["questions"] == key["questions"]
    for other, word in (
        (key | {"questions": "?"}, "questions"),
        (others, "references"),
        (key | {"--max-new-tokens": 7}, "--max-new-tokens"),
    ):
        with pytest.raises(KeepsightError, match=rf"asked otherwise .{word}\)"):
            Kept(file, other)
    again.complete()
    assert not file.exists()


def test_other_pictures_are_other_questions(grids):
    ask = [fingerprint([Sample("read", (image,), answer="1")]) for image in (*grids[0][:2], grids[0][0])]
    assert ask[0] == ask[2] != ask[1]


def test_questions_that_all_differ_alike_have_no_interval(capsys):
    """A bootstrap of equal numbers is one point, which would read as certainty."""
    texts = [Answer(text, 4, 9) for text in ("1", "1")]
    for on, word in ((texts, "+0.0 points"), ([Answer("2", 4, 9)] * 2, "-100.0 points")):
        _show(Evaluation(EvalSettings(memory="free"), [("1",), ("1",)], texts, on))
        said = capsys.readouterr().out
        assert f"neither better nor worse that could be shown ({word}, 95 % interval unknown: all alike" in said
        assert "memory free" in said
        assert "[+0.0, +0.0]" not in said
        assert said.count("[all alike]") == 2  # in the table, where brackets are no markup


def test_the_command(tmp_path, grids, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images, digits = grids
    with open("q.jsonl", "w") as file:
        for index, (image, grid) in enumerate(zip(images, digits, strict=True)):
            image.save(f"{index}.png")
            row = {"image": f"{index}.png", "prompt": "read", "answer": f"{CELLS[4]} {grid[4]}"}
            file.write(json.dumps(row) + "\n")
    command = ["eval", "keepsight/reference-vismem", "-d", "q.jsonl", "--match", "contains", "--max-new-tokens", "24"]
    done = CliRunner().invoke(app, [*command, "--strata", "2"])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "keepsight-eval.json").read_text())
    assert len(report["answers"]) == 6
    assert report["all"]["off"]["value"] == np.mean([row["off"]["right"] for row in report["answers"]])
    assert f"{report['all']['off']['value']:.1%}" in done.output
    for more, word in (
        (["--memory", "only_short"], None),
        (["-a", "nowhere"], "nowhere"),
        (["--data", "missing.jsonl"], "missing.jsonl"),
    ):
        again = CliRunner().invoke(app, [*command, *more])
        assert (again.exit_code == 0) == (word is None), again.output
        assert word is None or word in again.output.replace("\n", "")
