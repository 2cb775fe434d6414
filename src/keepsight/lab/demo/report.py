"""The demo's report: one HTML page that needs nothing but itself, for a reader who knows none of the words."""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape
from string import Template
from typing import Any

from PIL import Image

from keepsight.lab.demo.claims import standard_error
from keepsight.lab.demo.plots import Figure, data_uri
from keepsight.lab.demo.report_page import PAGE
from keepsight.lab.demo.seeds import in_words
from keepsight.lab.digits import CELLS, GLYPH, GRID
from keepsight.lab.samples import Word

NAMES = {
    "base": "Base",
    "pvm": "PVM",
    "lora": "LoRA",
    "mlp": "Parallel MLP",
    "pvm_plain": "PVM without warm-up",
    "lora_long": "LoRA at full length",
}
WHAT = {
    "base": "The small model as it came, trained on short outputs only.",
    "pvm": "Two small branches that look at the image alone, with a softmax of their own. Text cannot crowd it out.",
    "lora": "Low-rank changes of the model's own attention: the usual way to fine-tune.",
    "mlp": "Two branches of the same size in the same places that look at nothing: is it just the extra parameters?",
    "pvm_plain": "The same memory and learning rates without keepsight's blindfold, which the paper does not have.",
    "lora_long": "LoRA trained on outputs as long as the longest asked here.",
}


def render_report(
    results: dict[str, Any],
    figures: dict[str, Figure],
    images: Sequence[tuple[Image.Image, list[int]]],
    narration: Sequence[Word],
) -> str:
    """The page.

    Args:
        results: content of `results.json`.
        figures: plots by name.
        images: examples with their digits; the first is the one that `narration` is about.
        narration: a few facts, word by word.
    """
    lengths = results["lengths"]
    short, far = str(lengths[0]), str(lengths[-1])
    fields = {
        "headline": _headline(results),
        "cards": _cards(results),
        "image": _grid(*images[0]),
        "narration": _narration(narration),
        "first_fact": _first_fact(narration),
        "short": f"{lengths[0]:,}",
        "far": f"{lengths[-1]:,}",
        "train_length": f"{results['train_length']:,}",
        "times": f"{lengths[-1] / results['train_length']:.0f}",
        "base_short": _percent(results["base"]["accuracy_by_length"][short]["accuracy"]),
        "base_far": _percent(results["base"]["accuracy_by_length"][far]["accuracy"]),
        "masked_far": _percent(results["base"]["masked_filler_accuracy_by_length"][far]["accuracy"]),
        "squeezed_far": _percent(results["base"]["squeezed_positions_accuracy_by_length"][far]["accuracy"]),
        "regime_note": escape(results["regime_note"]),
        "controls_table": _controls_table(results),
        "mass": _picture(figures["attention_mass"]),
        "mass_words": _mass_words(results),
        "methods": _methods(results),
        "accuracy": _picture(figures["accuracy_by_length"]),
        "accuracy_table": _accuracy_table(results, [m for m in NAMES if m in results]),
        "se_note": _se_note(results),
        "causal": _picture(figures["causal"]),
        "causal_words": _causal_words(results),
        "causal_table": _causal_table(results),
        "verdict": _verdict(results),
        "warmup_words": _warmup_words(results),
        "long_words": _long_words(results),
        "share": _percent(results["pvm"]["trainable_parameters"] / results["base"]["language_model_parameters"]),
        "warmup_steps": str(results["plan"]["warmup_steps"]),
        "conditions": _conditions(results),
        "seed": str(results["seed"]),
        "seeds_words": escape(in_words(results["study"])) if results["study"] else "",
        "seeds_table": _seeds_table(results["study"]) if results["study"] else "",
        "quick": (
            "<p class='note'>This is the quick version: fewer training steps, fewer images and fewer methods. "
            "<code>keepsight demo</code> runs the full one.</p>"
            if results["quick"]
            else ""
        ),
    }
    return Template(PAGE).substitute(fields)


def _percent(value: float) -> str:
    return f"{value:.0%}"


def _headline(results: dict[str, Any]) -> str:
    held = {entry["name"]: entry["held"] for entry in results["verdict"]}
    if held["base_falls"] and held["pvm_keeps"] and held["pvm_ahead"]:
        return "A small model loses sight of its image as its answer grows. A memory of the image keeps it in view."
    if held["pvm_keeps"]:
        return "With a memory of the image, a small model reads it as well after a long answer as after a short one."
    return "In this run the memory did not bring what it usually brings. The numbers below show how far it came."


def _cards(results: dict[str, Any]) -> str:
    far = results["lengths"][-1]
    cells = []
    for method in ("base", "pvm", "lora", "mlp"):
        value = results[method]["accuracy_by_length"][str(far)]["accuracy"]
        cells.append(f"<div class='card {method}'><b>{_percent(value)}</b><span>{NAMES[method]}</span></div>")
    return "".join(cells)


def _grid(image: Image.Image, digits: Sequence[int]) -> str:
    """The image, enlarged, with lines between its cells and their names along the edges."""
    side, line = 72, 4
    board = Image.new("RGB", (GRID * side + (GRID - 1) * line,) * 2, "#8a94a0")
    for cell in range(len(CELLS)):
        column, row = cell % GRID, cell // GRID
        box = (column * GLYPH, row * GLYPH, (column + 1) * GLYPH, (row + 1) * GLYPH)
        glyph = image.crop(box).resize((side, side), resample=Image.Resampling.BICUBIC)
        board.paste(glyph, (column * (side + line), row * (side + line)))
    buffer = io.BytesIO()
    board.save(buffer, format="PNG")
    text = ", ".join(f"{cell} {digit}" for cell, digit in zip(CELLS, digits, strict=True))
    columns = "".join(f"<i>{name[0]}</i>" for name in CELLS[:GRID])
    rows = "".join(f"<i>{name[1]}</i>" for name in CELLS[::GRID])
    picture = f"<img alt='A grid of handwritten digits: {text}' src='{data_uri(buffer.getvalue())}'>"
    return f"<div class='grid'><div class='columns'>{columns}</div><div class='rows'>{rows}</div>{picture}</div>"


_ORDINALS = ("first", "second", "third", "fourth")


def _first_fact(words: Sequence[Word]) -> str:
    """Explain the first fact of the narration."""
    cell = next(word.text for word in words if word.kind == "cell")
    digit = next(word.text for word in words if word.kind == "digit")
    column, row = _ORDINALS["abcd".index(cell[0])], _ORDINALS[int(cell[1]) - 1]
    return (
        f"<mark class='cell'>{cell}</mark>&nbsp;<mark class='digit'>{digit}</mark> says that cell {cell} ({column} "
        f"column, "
        f"{row} row) holds a {digit}."
    )


def _narration(words: Sequence[Word]) -> str:
    parts = []
    for word in words:
        if word.kind in ("cell", "digit"):
            mark = f"<mark class='{word.kind}'>{escape(word.text)}</mark>"
            parts.append(f" {mark}" if word.kind == "cell" else f"&nbsp;{mark}")  # a fact stays on one line
        else:
            parts.append("&nbsp;." if word.kind == "stop" else f" {escape(word.text)}")
    return "".join(parts).strip() + " …"


def _picture(figure: Figure) -> str:
    return (
        "<picture><source media='(prefers-color-scheme: dark)' srcset='"
        f"{figure.dark}'><img class='plot' alt='{escape(figure.alt)}' src='{figure.light}'></picture>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers_from: int = 1) -> str:
    def cell(tag: str, index: int, text: str) -> str:
        return f"<{tag}{' class=n' if index >= numbers_from else ''}>{text}</{tag}>"

    top = "".join(cell("th", i, text) for i, text in enumerate(head))
    body = "".join("<tr>" + "".join(cell("td", i, text) for i, text in enumerate(row)) + "</tr>" for row in rows)
    return f"<div class='scroll'><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def _lengths_head(results: dict[str, Any]) -> list[str]:
    limit = results["train_length"]
    return [f"{n:,}" if n <= limit else f"<span class='beyond'>{n:,}</span>" for n in results["lengths"]]


def _row(results: dict[str, Any], method: str, key: str) -> list[str]:
    return [_percent(results[method][key][str(n)]["accuracy"]) for n in results["lengths"]]


def _accuracy_table(results: dict[str, Any], methods: Sequence[str]) -> str:
    rows = [[f"<b class='{m}'>{NAMES[m]}</b>", *_row(results, m, "accuracy_by_length")] for m in methods]
    return _table(["Tokens", *_lengths_head(results)], rows)


def _controls_table(results: dict[str, Any]) -> str:
    rows = [
        ["base as it is", *_row(results, "base", "accuracy_by_length")],
        ["filler hidden, distances kept", *_row(results, "base", "masked_filler_accuracy_by_length")],
        ["filler seen, distances squeezed", *_row(results, "base", "squeezed_positions_accuracy_by_length")],
    ]
    return _table(["Tokens", *_lengths_head(results)], rows)


def _methods(results: dict[str, Any]) -> str:
    items = []
    for method in (m for m in NAMES if m in results):
        entry = results[method]
        facts = "not trained"
        if method != "base":
            facts = f"{entry['trainable_parameters']:,} parameters, {entry['training_seconds']:.0f}&nbsp;s of training"
        items.append(f"<dt><b class='{method}'>{NAMES[method]}</b> <span>{facts}</span></dt><dd>{WHAT[method]}</dd>")
    return "<dl>" + "".join(items) + "</dl>"


def _se_note(results: dict[str, Any]) -> str:
    n = results["base"]["accuracy_by_length"][str(results["lengths"][-1])]["n"]
    return (
        f"Each number is a mean over {n} answers, so its standard error is {standard_error(0.98, n):.1%} at 98 % and "
        f"{standard_error(0.5, n):.1%} at 50 %. The handwriting in these images was seen in no training and in no "
        f"choice of settings."
    )


def _mass_words(results: dict[str, Any]) -> str:
    def ends(who: str) -> tuple[float, float]:
        layers = results["base"]["visual_attention_mass"][who]["layers"]
        return sum(layer[0] for layer in layers) / len(layers), sum(layer[-1] for layer in layers) / len(layers)

    position = results["base"]["visual_attention_mass"]["base"]["position"][-1]
    base, untrained = ends("base"), ends("untrained")
    return (
        f"Averaged over layers, the base spends {base[0]:.0%} of its attention on the image at the first word and "
        f"{base[1]:.1%} around word {position:,.0f}. <b>That alone is no proof of harm</b>: a model of the same shape "
        f"that was never "
        f"trained goes from {untrained[0]:.0%} to {untrained[1]:.1%}, simply because there is more text to look at. "
        "What counts is whether the answers suffer, and whether they recover when only the crowd of text is taken away."
    )


def _causal_words(results: dict[str, Any]) -> str:
    causal, n = results["pvm"]["causal"], results["pvm"]["causal"]["length"]
    base = results["base"]["accuracy_by_length"][str(n)]["accuracy"]
    follows = causal["swapped_follows"] > 0.7 and causal["swapped"] < 0.3
    end = (
        "The answers follow the memory, not the page in front of the model."
        if follows
        else "In this run the answers follow the memory only in part."
    )
    same = "exactly the base's" if abs(causal["gate_off"] - base) < 1e-6 else f"against the base's {base:.1%}"
    return (
        f"After {n:,} tokens, PVM reads {causal['on']:.0%}. With its gate off it reads {causal['gate_off']:.1%}, "
        f"{same}. With noise of the "
        f"same strength in memory: {causal['noise']:.0%}. With <em>another</em> image in memory, "
        f"{causal['swapped']:.0%} of the "
        f"answers fit the image that the model was shown, and {causal['swapped_follows']:.0%} fit the other one. {end}"
    )


def _causal_table(results: dict[str, Any]) -> str:
    by_length = results["pvm"]["causal_by_length"]
    keys = (
        ("on", "memory on"),
        ("gate_off", "gate off"),
        ("noise", "memory is noise"),
        ("swapped", "another image's memory, own image scored"),
        ("swapped_follows", "the same answers, other image scored"),
    )
    rows = [[label, *(_percent(entry[key]) for entry in by_length.values())] for key, label in keys]
    return _table(["", *(f"after {int(n):,} tokens" for n in by_length)], rows)


def _verdict(results: dict[str, Any]) -> str:
    items = []
    for entry in results["verdict"]:
        mark = "<span class='yes'>held</span>" if entry["held"] else "<span class='no'>did not hold</span>"
        items.append(f"<li>{mark} <b>{escape(entry['claim'])}.</b> {escape(entry['measured'])}</li>")
    return "<ul class='verdict'>" + "".join(items) + "</ul>"


def _seeds_table(study: dict[str, Any]) -> str:
    rows = [
        [
            f"<b class='{method}'>{NAMES[method]}</b>",
            *(_percent(entry[name]) for name in ("here", "mean", "min", "max")),
            str(entry["seeds"]),
        ]
        for method, entry in study["methods"].items()
    ]
    return _table([f"After {study['length']:,} tokens", "this run", "mean", "lowest", "highest", "seeds"], rows)


def _warmup_words(results: dict[str, Any]) -> str:
    share = results["plan"]["blindfold_share"]
    after = f", nor in {share:.0%} of the steps after that" if share else ""
    words = (
        f"In the first {results['plan']['warmup_steps']} training steps the frozen model's text could not see the "
        f"image{after}, so that only the memory could bring the answer. This <em>blindfold</em> is keepsight's own "
        "addition and is not in the PVM paper. "
    )
    far = results["lengths"][-1]
    if "pvm_plain" not in results:
        return words + "This run did not train a PVM without it; the full demo does."
    plain = results["pvm_plain"]["accuracy_by_length"][str(far)]["accuracy"]
    with_it = results["pvm"]["accuracy_by_length"][str(far)]["accuracy"]
    return words + (
        f"Without it, on the same data and steps, PVM reads {plain:.0%} after {far:,} tokens in this run, against "
        f"{with_it:.0%} with it: "
        "the look-up through the memory forms all at once or not at all, and while short answers come easily there is "
        "little to make "
        "it form."
    )


def _long_words(results: dict[str, Any]) -> str:
    if "lora_long" not in results:
        return (
            "LoRA trained on outputs as long as the ones it is asked about nearly closes the gap at those lengths. "
            "(Said from earlier "
            "experiments; this run did not measure it, the full demo does.) So the fair claim is not that LoRA cannot, "
            "but that the "
            "memory works far beyond the length that it was trained at."
        )
    lengths = [n for n in results["lengths"] if n > results["train_length"]][-2:]
    parts = []
    for n in lengths:
        long, lora, pvm = (results[m]["accuracy_by_length"][str(n)]["accuracy"] for m in ("lora_long", "lora", "pvm"))
        numbers = f"after {n:,} tokens ({long:.0%}; trained short {lora:.0%}; PVM {pvm:.0%})"
        parts.append(f"{_share_closed(long, lora, pvm)} {numbers}")
    return (
        f"LoRA trained on outputs of up to {results['lora_long']['train_length']:,} tokens, half that on average, "
        f"closes "
        f"{' and '.join(parts)}. It took {results['lora_long']['training_seconds']:.0f} s of training against PVM's "
        f"{results['pvm']['training_seconds']:.0f} s. So the fair claim is not that LoRA cannot, but that the memory "
        f"works far "
        "beyond the length that it was trained at."
    )


def _share_closed(long: float, lora: float, pvm: float) -> str:
    """How much of the gap between LoRA and PVM is closed, in words."""
    gap = pvm - lora
    if gap < 0.03:
        return "what little gap there is"
    share = (long - lora) / gap
    if share > 0.8:
        return "the gap, or nearly all of it,"
    return "most of the gap" if share > 0.5 else "a part of the gap" if share > 0.1 else "none of the gap"


def _conditions(results: dict[str, Any]) -> str:
    c = results["conditions"]
    return (
        f"{escape(c['date'])}, {c['cores']} CPU cores ({escape(c['machine'])}), {c['workers']} worker processes of one "
        f"thread, "
        f"{results['seconds']:.0f} s in all, float32; Python {escape(c['python'])}, torch {escape(c['torch'])}, "
        f"transformers "
        f"{escape(c['transformers'])}, PEFT {escape(c['peft'])}, keepsight {escape(c['keepsight'])}; base "
        f"<code>{escape(results['base_checkpoint'])}</code>, seed {results['seed']}, {escape(results['split'])} glyphs."
    )
