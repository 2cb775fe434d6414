"""The demo end to end, with hardly any steps: what it writes is complete, self-contained and loads."""

import itertools
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from PIL import Image
from typer.testing import CliRunner

import keepsight
from keepsight.cli import app
from keepsight.lab import evaluation
from keepsight.lab.demo.methods import DemoSettings
from keepsight.lab.demo.run import DemoOutputError, check_output, describe_regime, measure_all, run_demo
from keepsight.lab.demo.seeds import in_words
from keepsight.lab.experiments import TrainPlan
from keepsight.lab.reference import REFERENCE_NAME

TINY = DemoSettings(
    plan=TrainPlan(warmup_steps=2, steps=2, batch=2),
    lengths=(32, 64, 128),
    rows=4,
    causal_lengths=(32, 128),
    mass_length=64,
    mass_rows=2,
    long_steps=2,
    long_batch=2,
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "deep" / "keepsight-demo"
    events = []
    results = run_demo(out, TINY, workers=0, on_progress=lambda *event: events.append(event))
    return out, results, events


def test_results_hold_what_was_promised(demo):
    out, results, _ = demo
    assert json.loads((out / "results.json").read_text()) == results
    assert results["regime"] == "pure_dilution"
    assert (results["seed"], results["train_length"]) == (0, TINY.plan.train_length)
    for method in ("base", "pvm", "lora", "mlp", "pvm_plain", "lora_long"):
        entry = results[method]
        assert (entry["trainable_parameters"] > 0) == (method != "base")
        assert (entry["training_seconds"] > 0) == (method != "base")
        assert list(entry["accuracy_by_length"]) == ["32", "64", "128"]
        for value in entry["accuracy_by_length"].values():
            assert value["n"] == TINY.rows * evaluation.SCORED
            assert 0 <= value["accuracy"] <= 1
    causal = results["pvm"]["causal"]
    assert {"on", "gate_off", "noise", "swapped", "swapped_follows"} <= causal.keys()
    assert causal["gate_off"] == results["base"]["accuracy_by_length"]["128"]["accuracy"]
    assert causal["on"] == results["pvm"]["accuracy_by_length"]["128"]["accuracy"]
    assert list(results["base"]["masked_filler_accuracy_by_length"]) == ["32", "64", "128"]
    assert {entry["name"] for entry in results["verdict"]} >= {"base_falls", "pvm_keeps", "pvm_ahead"}


def test_quick_and_full_reach_four_times_the_training_length():
    for settings in (DemoSettings(), DemoSettings.quick()):
        assert settings.lengths[-1] >= 4 * settings.plan.train_length
        assert settings.causal_lengths[-1] in settings.lengths
        assert settings.causal_lengths[-1] >= 4 * settings.plan.train_length
        assert settings.split == "test"


def test_nothing_else_is_left_in_the_folder(demo):
    out, _, _ = demo
    assert sorted(path.name for path in out.iterdir()) == [
        "accuracy_by_length.png",
        "adapter",
        "attention_mass.png",
        "begun.txt",
        "causal.png",
        "example-1.png",
        "example-2.png",
        "example-3.png",
        "report.html",
        "results.json",
    ]
    for path in out.glob("*.png"):
        with Image.open(path) as image:
            assert min(image.size) >= 256


def test_what_the_page_says_to_try_is_what_the_commands_answer(demo):
    out, results, _ = demo
    tried = results["try_it"]
    words = (out / "begun.txt").read_text().split()
    assert (len(words), words[-1]) == (TINY.lengths[-1] + 1, tried["cell"])
    begun = f"{out}/adapter -i {out}/example-1.png -p describe --prefill {out}/begun.txt --max-new-tokens 1"
    for more, said in (("", "with_memory"), (" --no-memory", "without")):
        done = CliRunner().invoke(app, ["generate", *(begun + more).split()])
        assert done.stdout.strip() == tried[said], done.output
        assert f"<code>{tried[said]}</code>" in (out / "report.html").read_text(encoding="utf-8")
    assert (tried["with_memory"] == tried["truth"] != tried["without"]) or tried["cell"] == "a1"


class Page(HTMLParser):
    """Collects what a page would fetch, and its words."""

    def __init__(self):
        super().__init__()
        self.fetches, self.words, self.open, self.ids, self.links = [], [], [], set(), []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.ids.add(values.get("id"))
        self.fetches += [values[name] for name in ("src", "srcset") if name in values]
        self.links += [values["href"]] if tag == "a" else []
        if tag not in ("meta", "img", "source", "br", "link"):
            self.open.append(tag)
        assert tag != "script"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_report_needs_nothing_but_itself(demo):
    out, results, _ = demo
    html = (out / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(html)
    assert page.open == []  # every element is closed
    assert len(page.fetches) >= 7
    assert all(address.startswith("data:image/png;base64,") for address in page.fetches)
    assert all(link[1:] in page.ids for link in page.links)
    assert "url(" not in html
    assert "@import" not in html
    assert "$" not in " ".join(page.words)
    assert "prefers-color-scheme: dark" in html
    text = re.sub(r"\s+", " ", " ".join(page.words))
    for must in (
        "not in the PVM paper",
        "What this does not show",
        "no proof of harm",
        "Filler hidden",
        "LoRA trained on",
        "Another seed, another number",
        in_words(results["study"]),
    ):
        assert must in text
    assert f"{results['pvm']['trainable_parameters']:,}" in text
    assert str(out) not in html


def test_the_saved_memory_is_the_one_that_was_measured(demo):
    out, results, _ = demo
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == REFERENCE_NAME
    model, processor = keepsight.load(out / "adapter")
    batches = evaluation.question_batches(processor, 128, TINY.rows, TINY.seed, "test")
    assert evaluation.accuracy(model, batches).as_dict() == results["pvm"]["accuracy_by_length"]["128"]
    gates = [round(p.item(), 4) for name, p in model.named_parameters() if name.endswith(".gate")]
    assert gates == results["pvm"]["gates"]


def test_progress_only_rises(demo):
    _, _, events = demo
    for job in TINY.rows_of_study:
        shares = [share for name, _, share in events if name == job]
        assert all(later > earlier - 1e-9 for earlier, later in itertools.pairwise(shares))
        assert shares[-1] == 1.0
        assert len(shares) > 4


def test_a_second_run_replaces_the_first(demo):
    out, results, _ = demo
    quick = replace(TINY, methods=("pvm", "lora", "mlp"), lengths=(32, 128))
    again = run_demo(out, quick, workers=0, quick=True)
    assert "lora_long" not in again
    for method in ("base", "pvm", "lora", "mlp"):  # the same seed gives the same numbers
        first, second = results[method]["accuracy_by_length"], again[method]["accuracy_by_length"]
        assert {n: first[n] for n in second} == second
    text = (out / "report.html").read_text(encoding="utf-8")
    assert "quick version" in text
    assert "nearly closes the gap" in text


def test_ctrl_c_leaves_no_results(tmp_path):
    def stop(job, what, share):
        if job == "lora":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path / "demo", TINY, workers=0, on_progress=stop)
    assert not (tmp_path / "demo").exists()


def test_a_bad_place_is_found_before_the_work(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DemoOutputError, match="is a file"):
        check_output(tmp_path / "file")
    with pytest.raises(DemoOutputError, match="cannot be written"):
        check_output(tmp_path / "file" / "below")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "report.html").write_text("mine")
    with pytest.raises(DemoOutputError, match="no earlier demo wrote"):
        check_output(mine)
    assert (mine / "report.html").read_text() == "mine"
    check_output(tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()


def test_processes_give_the_numbers_of_one(tmp_path, demo):
    settings = replace(TINY, methods=("mlp",))
    done = []
    results = measure_all(settings, tmp_path, 2, on_done=lambda name, _: done.append(name))
    assert sorted(done) == ["base", "mlp"]
    for name in done:
        assert results[name]["accuracy_by_length"] == demo[1][name]["accuracy_by_length"]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_stops_a_method_stops_the_demo(tmp_path, workers):
    settings = replace(TINY, methods=(), base=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no checkpoint folder"):
        measure_all(settings, tmp_path, workers)


def test_the_regime_is_what_pretraining_recorded(tmp_path):
    assert describe_regime(None)[0] == "pure_dilution"
    assert describe_regime(tmp_path)[0] == "unknown"
    (tmp_path / "pretraining.json").write_text(json.dumps({"config": {"max_jump": 0}}))
    regime, note = describe_regime(tmp_path)
    assert regime == "rotary_range"
    assert "not of dilution" in note


def test_the_command_prints_its_numbers(tmp_path, monkeypatch, capsys):
    import typer

    from keepsight.cli.demo import demo as command

    monkeypatch.setattr(DemoSettings, "quick", classmethod(lambda cls, seed, base: replace(TINY, seed=seed, base=base)))
    app = typer.Typer()
    app.command()(command)
    out = tmp_path / "demo"
    result = CliRunner().invoke(app, ["--quick", "--output-dir", str(out), "--workers", "0", "--seed", "1"])
    assert result.exit_code == 0, result.output
    written = json.loads((out / "results.json").read_text())
    assert written["seed"] == 1
    shown = capsys.readouterr().out + result.output
    for number in (
        written["pvm"]["accuracy_by_length"]["128"]["accuracy"],
        written["pvm"]["causal"]["swapped_follows"],
    ):
        assert f"{number:.1%}" in shown
    assert f"{written['lora']['trainable_parameters']:,}" in shown


def test_the_command_refuses_a_base_that_is_none(tmp_path):
    import typer

    from keepsight.cli.demo import demo as command

    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, ["--output-dir", str(tmp_path / "demo"), "--base", str(tmp_path)])
    assert "no base" in str(result.exception)
    assert not (tmp_path / "demo").exists()
