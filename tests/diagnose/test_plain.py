"""The page's first sentences follow from what was measured; its drawings are true to it and stand by themselves."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from keepsight.checkpoints.adapters import trained_steps
from keepsight.diagnose import Diagnosis
from keepsight.diagnose.battery.lengths import LengthResult, Quartile
from keepsight.diagnose.battery.verdict import (
    ENOUGH_SCORE,
    CausalResult,
    Condition,
    HalfWay,
    verdict_from,
)
from keepsight.diagnose.report import render_report, save_charts
from keepsight.diagnose.report.charts import NO_PROOF, _by_time
from keepsight.diagnose.report.plain import opening
from keepsight.diagnose.report.svg import heat_map
from keepsight.diagnose.statistics import Estimate
from keepsight.words import counted, listed

FACTS = {
    "name": "my <memory>",
    "family": "Qwen3-VL",
    "layers": 4,
    "softmax_layers": [0, 1, 2, 3],
    "attention": "sdpa",
    "memory": "PVM",
    "memory_layers": [1],
    "memory_latents": {},
    "gates": {1: 0.31},
    **dict.fromkeys(("keepsight", "torch", "transformers", "device", "dtype"), "x"),
}


def about(value: float, width: float = 0.05) -> Estimate:
    return Estimate(value, value - width, value + width, 8)


def diagnosis(contrast: float, follows: float | None = 0.67, **model: Any) -> Diagnosis:
    lost = about(-contrast)
    causal = CausalResult("PVM", "samples", 8, about(0.9))
    causal.conditions = [Condition("other image", "it remembers another image", lost, lost)]
    half = None if follows is None else about(follows)
    causal.half_way = [HalfWay("memory swapped", "only its memory", half, half, lost)]
    causal.verdict = verdict_from(about(contrast), "of task score", ENOUGH_SCORE)
    return Diagnosis(model={**FACTS, **model}, settings={}, causal=causal)


def test_lengths_are_told_where_they_differ() -> None:
    def told(*spans: tuple[int, int]) -> list[str]:
        quarters = [
            Quartile(*span, {"base": about(0.9 - 0.2 * at), "memory": about(0.9)}, about(0.0), 0.0)
            for at, span in enumerate(spans)
        ]
        lengths = LengthResult("written freely", quarters)
        return [one.text for one in opening(replace(diagnosis(0.6), lengths=lengths)) if "shortest answers" in one.text]

    assert told((3, 5), (5, 9), (9, 30), (31, 80)) == [
        "Of the shortest answers, up to 5 tokens, 90 % are right, and of the longest, 31 or more, 90 %; "
        "with the memory off 90 and 30 %."
    ]
    assert told((4, 4), (4, 4), (4, 4), (4, 5)) == []


def test_a_used_memory_is_told_by_what_follows_it() -> None:
    first, gates = opening(diagnosis(0.6, 0.67, steps=260))
    assert first.text.startswith("Your memory is used: with another image in it, answers change to that image in 67 of")
    assert "60 more of 100 answers are wrong" in first.text
    assert first.tone == "good"
    assert gates.text == "260 steps of training, gate at 0.31."
    assert "answers change" not in opening(diagnosis(0.6, None))[0].text


@pytest.mark.parametrize(
    ("gates", "steps", "told"),
    [
        (
            {1: 0.0025},
            5,
            "5 steps of training, gate at 0.0025: a gate begins at 0, and one so small lets next to nothing through.",
        ),
        ({1: 0.4, 3: 0.2}, 1, "1 step of training, gates at 0.4 and 0.2. Train longer, or with a longer warm-up"),
        ({1: 0.0}, None, "gate at 0: it was not trained yet, and changes nothing."),
    ],
)
def test_an_unused_memory_is_told_what_to_do(gates: dict[int, float], steps: int | None, told: str) -> None:
    lines = opening(diagnosis(0.01, 0.1, gates=gates, steps=steps))
    assert lines[0].text.startswith("Your memory is not used:")
    assert "67" not in lines[0].text
    assert lines[1].text.startswith(told)


def test_the_page_opens_with_the_sentences_and_escapes_what_it_was_given() -> None:
    found = diagnosis(0.6)
    page = render_report(found)
    assert page.index("Your memory is used") < page.index("What it wrote") < page.index(found.causal.verdict.rule)
    assert "my <memory>" not in page
    assert "my &lt;memory&gt;" in page


def test_the_warning_stands_with_the_curve(with_memory: tuple[Any, Any], tmp_path: Path) -> None:
    from keepsight.diagnose import Sample, Settings, examine
    from keepsight.lab.samples import example_images

    image = example_images(1, 0)[0][0]
    found = examine(*with_memory, [Sample("describe", (image,))], Settings(steps=48, causal_steps=16))
    page = render_report(found)
    figure = re.search(r'<figure class="chart withnote">.*?</figure>', page, re.DOTALL)
    assert figure is not None
    assert NO_PROOF[:30] in figure[0]
    assert "Visual attention mass by text length" in figure[0]
    for file in save_charts(found, tmp_path):  # each is a drawing by itself
        root = ElementTree.parse(file).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert len(list(root.iter())) > 20


@pytest.mark.parametrize("steps", [np.arange(100), np.arange(0, 700, 7), np.array([0, 1, 2, 3, 50, 51])])
def test_time_runs_straight_in_a_heat_map(steps: np.ndarray) -> None:
    values, edges = _by_time(np.repeat(steps[:, None].astype(float), 2, 1), steps)
    assert values.shape == (2, len(edges) - 1)
    assert edges[0] == steps[0]
    for c, value in enumerate(values[0]):  # what a column shows lies between its edges
        assert edges[c] <= value <= edges[c + 1]
    drawn = heat_map(values, ["a", "b"], edges, "tokens", "t", "%")
    found = re.findall(r'class="cell" x="([\d.]+)" y="14.0" width="([\d.]+)"', drawn)
    boxes = np.array([[float(x), float(width) - 0.3] for x, width in found])
    lengths = np.diff(edges)
    assert boxes[:, 1] / boxes[:, 1].sum() == pytest.approx(lengths / lengths.sum(), abs=2e-3)
    assert 'class="peak"' in drawn


def test_steps_are_read_from_what_a_trainer_left(tmp_path: Path) -> None:
    assert trained_steps(tmp_path) is None
    for number, text in ((9, '{"global_step": 9}'), (10, '{"progress": {"step": 10}}'), (11, "cut off")):
        (tmp_path / f"checkpoint-{number}").mkdir()
        (tmp_path / f"checkpoint-{number}" / "trainer_state.json").write_text(text)
    assert trained_steps(tmp_path) == 10


def test_counts_are_english() -> None:
    assert [counted(n, "memory", "memories") for n in (0, 1, 1024)] == ["0 memories", "1 memory", "1,024 memories"]
    assert [listed(list(letters)) for letters in ("a", "ab", "abc")] == ["a", "a and b", "a, b and c"]


def test_no_verdict_is_said_to_be_none() -> None:
    found = diagnosis(0.6)
    assert found.causal is not None
    found.causal.verdict = replace(found.causal.verdict, word="not enough data", figure=None, rule="2 units")
    assert opening(found)[0].text == "Whether your memory is used cannot be said: 2 units."
