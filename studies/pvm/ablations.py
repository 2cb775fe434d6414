"""PVM's ablations in the lab: at which layers, how wide, and what to retrieve from by which rule."""

from __future__ import annotations

from keepsight.lab.study.results import Judgement, Results, judged
from keepsight.lab.study.study import Claim, Plot, Study, TableRow
from studies.pvm.cells import train_cell
from studies.pvm.studies import (
    FAR,
    PAPER,
    READING,
    length_columns,
    training_of,
)

# --- where, how wide, and what to retrieve from -----------------------------------------------------------------------


def _strided(results: Results) -> Judgement:
    chosen = {row: results.fact(row, "layers") for row in ("peak", "decay")}
    words = "; ".join(
        f"{row} chose " + ", ".join("+".join(map(str, layers)) for layers in found.values())
        for row, found in chosen.items()
    )
    gaps = {row: results.difference("strided", row, FAR) for row in chosen}
    numbers = f"Strided minus peak attention {gaps['peak'].points()}, minus max decay {gaps['decay'].points()}"
    if sum(layers == [1, 3] for found in chosen.values() for layers in found.values()) > len(chosen["peak"]):
        return Judgement("cannot be tested here", f"With four layers the strategies mostly agree ({words}). {numbers}.")
    return judged(all(gap.low > 0 for gap in gaps.values()), f"{numbers} at 2,048 tokens ({words}).")


def _some_layer_alone(results: Results) -> Judgement:
    best = results.best(("only0", "only1", "only2", "only3"), FAR)
    gap = results.difference("strided", best, FAR)
    return judged(
        gap.low > 0,
        f"At 2,048 tokens, strided minus the best single layer ({best[-1]}, half the parameters): {gap.points()}. "
        "Singles: " + ", ".join(f"layer {i} {results.at(f'only{i}', FAR).percent()}" for i in range(4)) + ".",
    )


LAYERS = Study(
    name="pvm-layers",
    method="PVM",
    title="Where to inject",
    setting=(
        "PVM with the warm-up at two of the four decoder layers, chosen as the paper chose them (peak attention: the "
        "two layers that look most at the image; max decay: the two whose look falls most; measured on each seed's "
        "base), and at single layers, which have half the parameters. The learning rate was tuned with layers 1 and 3."
    ),
    cell=train_cell,
    rows=(
        TableRow("strided", "strided: 1 and 3", same_as=("pvm-length", "pvm")),
        TableRow("peak", "peak attention", {"strategy": "peak"}),
        TableRow("decay", "max decay", {"strategy": "decay"}),
        *(TableRow(f"only{i}", f"layer {i} alone", training_of("pvm", layers=[i])) for i in range(4)),
    ),
    columns=length_columns(),
    claims=(
        Claim(
            "Strided layers are best (70.6 against 69.3 for max decay and 68.4 for peak attention).",
            f"{PAPER}, layer ablation",
            ("strided", "peak", "decay"),
            _strided,
        ),
        Claim("Several layers are needed.", "ours", ("strided", "only0", "only1", "only2", "only3"), _some_layer_alone),
    ),
    settings={**READING, **training_of("pvm")},
    plot=Plot("bars", columns=(FAR,)),
)


def _narrow(results: Results) -> Judgement:
    wider = ("w32", "w64", "w128")
    gaps = {row: results.difference(row, "w16", FAR) for row in wider}
    words = ", ".join(f"{row[1:]}: {gap.points()}" for row, gap in gaps.items())
    return judged(not any(gap.low > 0 for gap in gaps.values()), f"At 2,048 tokens, minus width 16: {words}.")


WIDTH = Study(
    name="pvm-width",
    method="PVM",
    title="Latent width",
    setting=(
        "PVM with the warm-up at layers 1 and 3, by latent width; the model is 96 wide and a head 16. The paper's "
        "widths are 1/8, 1/4 and 1/2 of its model's; width 16 is 1/6 here and is a single head."
    ),
    cell=train_cell,
    rows=(
        TableRow("w16", "16", training_of("pvm", width=16)),
        TableRow("w32", "32", training_of("pvm", width=32)),
        TableRow("w64", "64 (the lab's default)", same_as=("pvm-length", "pvm")),
        TableRow("w128", "128", training_of("pvm", width=128)),
    ),
    columns=length_columns(),
    claims=(
        Claim(
            "A narrow latent space is enough: wider ones are no better (512: 70.6, 1024: 69.2, 2048: 69.8).",
            f"{PAPER}, width ablation",
            ("w16", "w32", "w64", "w128"),
            _narrow,
        ),
    ),
    settings=READING,
    plot=Plot("bars", columns=(FAR,)),
)


def _collapse(results: Results) -> Judgement:
    gap, base = results.difference("embeddings", "hidden", FAR), results.difference("hidden", "base", FAR)
    return judged(
        gap.low > 0 and base.high < 0,
        f"At 2,048 tokens embeddings are {gap.points()} ahead of hidden states; hidden states against the base: "
        f"{base.points()}.",
    )


def _plain_collapse(results: Results) -> Judgement:
    gap, base = (
        results.difference("embeddings_plain", "hidden_plain", "mean"),
        results.difference("hidden_plain", "base", "mean"),
    )
    return judged(
        gap.low > 0 and base.high < 0,
        f"By plain SFT, averaged over lengths, embeddings are {gap.points()} ahead of hidden states; hidden "
        f"states against the base: {base.points()}.",
    )


def _rule(results: Results) -> Judgement:
    gap = results.difference("embeddings", "published", "mean")
    return judged(gap.high >= 0, f"Causal minus published, averaged over lengths: {gap.points()}.")


SOURCE = Study(
    name="pvm-source",
    method="PVM",
    title="What to retrieve from, and by which rule",
    setting=(
        "The memory holds either the raw visual embeddings or, as the paper's control, the processed hidden states "
        "that the visual positions have reached at each block's layer. And keepsight's causal rule (text reads the "
        "images before it) against the published one (all text reads all images): with the image at the front they "
        "differ in two tokens, so this row can only show that the difference is harmless there."
    ),
    cell=train_cell,
    rows=(
        TableRow("base", "base", same_as=("pvm-length", "base")),
        TableRow("embeddings", "embeddings, with warm-up", same_as=("pvm-length", "pvm")),
        TableRow("hidden", "processed hidden states, with warm-up", training_of("pvm", source="hidden")),
        TableRow("embeddings_plain", "embeddings, plain SFT", same_as=("pvm-length", "pvm_plain")),
        TableRow("hidden_plain", "processed hidden states, plain SFT", training_of("pvm_plain", source="hidden")),
        TableRow("published", "embeddings, with warm-up, published rule", training_of("pvm", causal=False)),
    ),
    columns=length_columns(),
    claims=(
        Claim(
            "Retrieving from processed hidden states collapses, below the base (33.4; embeddings 63.0, base 59.4); "
            "here by plain SFT.",
            f"{PAPER}, retrieval source",
            ("embeddings_plain", "hidden_plain", "base"),
            _plain_collapse,
        ),
        Claim(
            "The same with the blindfold warm-up.",
            f"{PAPER}, retrieval source; our recipe",
            ("embeddings", "hidden", "base"),
            _collapse,
        ),
        Claim("The causal rule is no worse than the published one.", "ours", ("embeddings", "published"), _rule),
    ),
    settings=READING,
    plot=Plot("bars", columns=(FAR,)),
)

STUDIES = (LAYERS, WIDTH, SOURCE)
