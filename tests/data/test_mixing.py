"""Several datasets with weights: exact shares, every sample seen, nothing held out is learned from; refused slips."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image
from tiny_training import draw_digit, make_data, read_rows, write_rows

from keepsight.data.check import check_dataset, read_sample
from keepsight.data.errors import DataError
from keepsight.data.mixing import MixedData, check_sources
from keepsight.data.mixture import load_sources, mixture_of_words
from keepsight.data.tables.reading import Reading
from keepsight.train.run.controls import hold_out


def mix(given: Any) -> MixedData:
    found = check_sources(given, "train", check_dataset).good()
    assert isinstance(found, MixedData)
    return found


def times(data: MixedData) -> Counter[tuple[int, int]]:
    return Counter(data.mixed().origins)


@pytest.mark.parametrize(("sizes", "weights"), [((20, 20), (1, 3)), ((4, 30), (3, 1)), ((7, 3, 11), (0.2, 0.5, 0.3))])
def test_an_epoch_has_the_shares_and_sees_every_sample(
    tmp_path: Path, sizes: tuple[int, ...], weights: tuple[float, ...]
) -> None:
    files = [make_data(tmp_path / str(place), size) for place, size in enumerate(sizes)]
    data = mix(list(zip(files, weights, strict=True)))
    seen = times(data)
    assert set(seen) == {(place, number) for place, size in enumerate(sizes) for number in range(size)}
    for place, weight in enumerate(weights):
        own = [often for (where, _), often in seen.items() if where == place]
        assert abs(sum(own) - seen.total() * weight / sum(weights)) <= 1
        assert max(own) - min(own) <= 1  # no sample is preferred within its dataset
    assert any(seen[place, 0] == 1 for place in range(len(sizes)))  # not longer than it must be
    assert (
        data.mixed().digest == data.mixed().mixed().digest == mix(list(zip(files, weights, strict=True))).mixed().digest
    )


def test_without_weights_every_sample_is_seen_once(tmp_path: Path) -> None:
    data = mix([make_data(tmp_path / "a", 3), make_data(tmp_path / "b", 5)])
    assert set(times(data).values()) == {1}
    assert data.mixed().rows == 8


def test_samples_are_those_of_each_dataset_alone(tmp_path: Path) -> None:
    """Stored images, files in folders of their own and columns of other names, each as its own dataset is read."""
    stored = datasets.Dataset.from_dict(
        {"question": ["q0", "q1"], "answer": ["0", "1"], "image": [draw_digit(0), draw_digit(1)]},
        features=datasets.Features(
            {"question": datasets.Value("string"), "answer": datasets.Value("string"), "image": datasets.Image()}
        ),
    )
    (tmp_path / "c").mkdir()
    draw_digit(7).save(tmp_path / "c" / "0.png")  # the same name as in the first dataset's folder
    named = write_rows(tmp_path / "c" / "c.jsonl", [{"query": "q", "reply": "r", "image": "0.png"}])
    given = [make_data(tmp_path / "a", 2), stored, Reading(named, {"question": "query", "answer": "reply"})]
    data = mix(given)
    together = [read_sample(row, data.source) for row in data.dataset]
    alone = []
    for one in given:
        checked = check_sources(one, "train", check_dataset).good()
        alone += [read_sample(row, checked.source) for row in checked.dataset]

    def plain(sample: dict[str, Any]) -> Any:
        return sample["messages"], [image.convert("RGB").tobytes() for image in sample["images"]]

    assert [plain(one) for one in together] == [plain(one) for one in alone]


def test_what_is_held_out_is_not_learned_from(tmp_path: Path) -> None:
    data = mix([(make_data(tmp_path / "a", 30), 1), (make_data(tmp_path / "b", 10), 9)])
    rest, held_out = hold_out(data)
    assert isinstance(rest, MixedData)
    assert isinstance(held_out, MixedData)
    assert len(set(held_out.origins)) == held_out.rows == 4
    assert not set(held_out.origins) & set(rest.mixed().origins)
    assert abs(sum(place for place, _ in rest.mixed().origins) / rest.mixed().rows - 0.9) < 0.01


def test_problems_of_all_datasets_are_told_at_once(tmp_path: Path) -> None:
    a, b = make_data(tmp_path / "a", 3), make_data(tmp_path / "b", 3)
    (tmp_path / "a" / "1.png").unlink()
    (tmp_path / "b" / "2.png").unlink()
    with pytest.raises(DataError) as caught:
        mix([a, b])
    assert f"{a}, line 2, images[0]" in str(caught.value)
    assert f"{b}, line 3, images[0]" in str(caught.value)


def test_columns_hold_where_they_are(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "i.png")
    a = write_rows(tmp_path / "a.jsonl", [{"query": "a?", "answer": "1", "image": "i.png"}])
    b = write_rows(tmp_path / "b.jsonl", [{"question": "b?", "answer": "2", "image": "i.png"}])
    data = mix(mixture_of_words([str(a), str(b)], ["question=query"]))
    asked = [read_sample(row, data.source)["messages"][0]["content"][-1]["text"] for row in data.dataset]
    assert asked == ["a?", "b?"]
    with pytest.raises(DataError, match=r"--columns question=qury: no dataset has a column 'qury'.*a.jsonl has query"):
        load_sources(mixture_of_words([str(a), str(b)], ["question=qury"]))


def test_other_weights_are_other_data_to_a_resumed_run(tmp_path: Path) -> None:
    a, b = make_data(tmp_path / "a", 4), make_data(tmp_path / "b", 4)
    agreed = [mix([(a, 1), (b, weight)]).mixed().agreed() for weight in (2, 3)]
    assert all(agreed[0][name] != agreed[1][name] for name in agreed[0])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a.jsonl=2"], "a.jsonl has a weight and is the only dataset"),
        (["a.jsonl=2", "b.jsonl"], r"b.jsonl: no weight, and others have one.*\(b.jsonl=1\)"),
        (["a.jsonl=0", "b.jsonl=1"], "a.jsonl=0.*: a weight is a number above 0"),
        (["a.jsonl=nan", "b.jsonl=1"], "a.jsonl=nan: a weight is a number above 0"),
        (["a.jsonl=half", "b.jsonl=1"], "'half' is no weight.*a.jsonl=0.5"),
        (["a.jsonl", "a.jsonl"], "a.jsonl is named twice.*a.jsonl=2"),
        (["a.jsonl=1", "b.jsonl=2", "./a.jsonl=1"], "a.jsonl is named twice"),
        (["a.jsonl=1e9", "b.jsonl=1"], "Bring the weights nearer"),
    ],
)
def test_weights_that_cannot_be_meant_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    for name in "ab":
        rows = read_rows(make_data(tmp_path / name, 3))
        write_rows(tmp_path / f"{name}.jsonl", [{**row, "images": [f"{name}/{row['images'][0]}"]} for row in rows])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=said):
        mix(mixture_of_words(words)).mixed()


def test_a_name_may_hold_the_sign(tmp_path: Path) -> None:
    rows = read_rows(make_data(tmp_path, 3))
    a, b = write_rows(tmp_path / "a=1", rows), write_rows(tmp_path / "b", rows)
    assert mixture_of_words([str(a), str(b)]).weights is None
    assert mixture_of_words([f"{a}=3", f"{b}=1"]).weights == (3, 1)
