"""lmms-eval finds keepsight by its entry point, runs a local task, and gives the scores of our own evaluation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import keepsight
from keepsight.data.images import open_image
from keepsight.diagnose.cases import Sample
from keepsight.errors import KeepsightError
from keepsight.evaluate.run import EvalSettings, evaluate
from keepsight.lab.digits import CELLS, draw_grids

HERE = Path(__file__).parent
MEMORY = "keepsight/reference-vismem"


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """The task's folder, and its questions: whether the answers name a cell rightly, one cell each."""
    folder = tmp_path_factory.mktemp("task")
    rng = np.random.default_rng(3)
    images, digits = draw_grids(12, "test", rng)
    rows = []
    for index, (image, grid) in enumerate(zip(images, digits, strict=True)):
        image.save(folder / f"{index}.png")
        cell = int(rng.integers(0, 6))
        rows.append({"images": [f"{index}.png"], "prompt": "read", "answer": f"{CELLS[cell]} {grid[cell]}"})
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for file in (HERE / "task").iterdir():
        if file.is_file():
            (folder / file.name).write_text(file.read_text().replace("DIGITS", str(folder)))
    return folder, rows


def lmms_eval(folder, out, arguments, *more):
    call = [sys.executable, "-m", "lmms_eval", "--model", "keepsight", "--model_args", arguments, "--device", "cpu"]
    call += ["--tasks", "keepsight_digits", "--include_path", str(folder), "--output_path", str(out), *more]
    here = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(call, capture_output=True, text=True, env=here, cwd=folder)


@pytest.mark.parametrize("memory", ["on", "off", "only_short"])
def test_scores_are_those_of_our_own_evaluation(task, tmp_path, memory):
    folder, rows = task
    model, processor = keepsight.load(MEMORY)
    samples = [Sample(r["prompt"], (open_image(folder / r["images"][0]),), answer=r["answer"]) for r in rows]
    settings = EvalSettings("on" if memory == "off" else memory, 40, 4, match="contains")
    ours = evaluate(model, processor, samples, settings, has_memory=True)
    mine = ours.right("off" if memory == "off" else "on").mean()

    arguments = f"pretrained={MEMORY},memory={memory},invocations={tmp_path / 'invoked.jsonl'}"
    done = lmms_eval(folder, tmp_path / "out", arguments, "--batch_size", "4", "--log_samples")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    [file] = (tmp_path / "out").rglob("*_results.json")
    theirs = json.loads(file.read_text())["results"]["keepsight_digits"]
    assert theirs["right,none"] == pytest.approx(mine)

    noted = [json.loads(line) for line in (tmp_path / "invoked.jsonl").read_text().splitlines()]
    answers = ours.off if memory == "off" else ours.on
    assert [line["doc_id"] for line in sorted(noted, key=lambda line: line["doc_id"])] == list(range(len(rows)))
    for line in noted:
        places = [(one["type"], one["after_tokens"]) for one in line["invocations"]]
        assert places == list(answers[line["doc_id"]].invocations)
    assert any(line["invocations"] for line in noted) == (memory != "off")


def test_a_batch_is_its_rows(task):
    from keepsight.evaluate.answering import Answerer, Question

    folder, rows = task
    model, processor = keepsight.load(MEMORY)

    def read(*names):
        parts = [*({"type": "image"} for _ in names), {"type": "text", "text": "read"}]
        return Question([{"role": "user", "content": parts}], tuple(open_image(folder / name) for name in names))

    asked = [read(row["images"][0]) for row in rows[:5]] + [read("0.png", "1.png")]
    answerer = Answerer(model, processor, "on")
    assert answerer.answers(asked, 24) == [answerer.answers([one], 24)[0] for one in asked]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [({"pretraind": "x"}, "pretraind"), ({"memory": "sometimes"}, "sometimes"), ({"batch_size": "auto"}, "batch_size")],
)
def test_what_is_not_known_is_refused(arguments, word):
    from keepsight.evaluate.lmms_model import KeepsightModel

    with pytest.raises(KeepsightError, match=word):
        KeepsightModel(**({"pretrained": MEMORY} | arguments))
