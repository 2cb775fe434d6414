"""The report of the studies: `docs/evidence.md` and one page per study, from the committed results and nothing else.

Verdicts are worked out from the numbers by each claim's judge; what was not run is listed as not run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from keepsight.lab.study.results import Interval, Judgement, Results
from keepsight.lab.study.runs import read_results
from keepsight.lab.study.study import Claim, Column, Study, TableRow
from studies.eye.report import part_two
from studies.overhead import costs, section

WRITTEN = "<!-- written by `python -m studies run` from the raw results; do not edit -->"

INTRODUCTION = f"""# Evidence
{WRITTEN}

This page says which claims of the papers' tables hold in small, and which do not.

    python -m studies run        # what is missing of the raw results, then this page and the tables' pages

The claims are asked again on a 0.64 M-parameter VLM of the Qwen3-VL architecture that is
pretrained from nothing for every seed, with handwritten digits that no training saw ([the lab](lab.md)). A model this
small, in a task made for the purpose, proves nothing about an 8 B model; it can show what a method does under controls
that nobody can afford at scale. Results that contradict a paper stand beside those that agree, and every verdict is
computed from the raw numbers.

**How to read it.** Accuracies are percent of answers right, teacher-forced; ± is half of the 95 % interval over seeds
(Student's t). Each seed has its own base, its own data and its own test images, so differences are taken seed by seed.
"Holds" needs the interval of the difference to exclude zero in the direction claimed, unless the text says otherwise;
"does not hold" includes "no difference could be shown", and "cannot be tested here" stands where no control shows that
the task could have shown it. An interval over five seeds is wide, and a verdict is about
this lab only.

**What was not asked.** What was *not run* stands in the tables: rows and claims were written down before their numbers.
No study has a pretrained language model; part two, below the costs, begins with one.
"""


@dataclass(frozen=True)
class Judged:
    """A claim of a study and the verdict on it."""

    study: Study
    claim: Claim
    verdict: Judgement


def judge(study: Study, results: Results) -> list[Judged]:
    """The verdicts on a study's claims."""
    found = []
    for claim in study.claims:
        if results.has(*claim.rows):
            verdict = claim.judge(results)
            seeds = len(results.seeds(*claim.rows))
            wanted = min(len(results.expected[row]) for row in claim.rows)
            if seeds < wanted:
                verdict = Judgement(verdict.word, f"{verdict.because} ({seeds} of {wanted} seeds.)")
        else:
            seeds = len(results.seeds(*claim.rows))
            few = "one seed is" if seeds == 1 else f"{seeds} seeds are"
            so_far = f"{few} too few to judge" if seeds else "not run yet"
            verdict = Judgement("not run", f"{so_far.capitalize()}: `python -m studies run {study.name}`.")
        found.append(Judged(study, claim, verdict))
    return found


def render(studies: Mapping[str, Study], folder: Path, out: Path, raw: str) -> list[Judged]:
    """Write the report and its plots.

    Args:
        studies: all studies, in order.
        folder: of the results.
        out: the markdown file with all claims. The studies' tables go to one page each, in a folder of its name beside
            it; plots go to `images/` beside it.
        raw: link from the folder of `out` to the results.

    Returns:
        All verdicts.
    """
    from studies.evidence_plots import draw

    results = {name: read_results(study, folder, studies) for name, study in studies.items()}
    verdicts = {name: judge(study, results[name]) for name, study in studies.items()}
    everything = [entry for entries in verdicts.values() for entry in entries]
    pages = out.with_suffix("")
    pages.mkdir(parents=True, exist_ok=True)
    for name, study in studies.items():
        picture = None
        if study.plot is not None and any(results[name].cells.values()):
            picture = f"images/evidence-{name}.png"
            (out.parent / "images").mkdir(exist_ok=True)
            (out.parent / picture).write_bytes(draw(study, results[name]))
        page = _page(study, results[name], verdicts[name], picture and f"../{picture}", f"../{raw}")
        (pages / f"{name}.md").write_text(page.replace("@@", f"../{out.name}"), encoding="utf-8")
    parts = [
        INTRODUCTION,
        _cost(studies, results),
        _summary(everything, pages.name),
        section(costs(), "performance.md"),
        part_two(folder, "eye.md", raw),
        _list(studies, pages.name),
    ]
    out.write_text("\n".join(parts), encoding="utf-8")
    return everything


def _cost(studies: Mapping[str, Study], results: Mapping[str, Results]) -> str:
    own = [(name, row.name) for name, study in studies.items() for row in study.rows if row.same_as is None]
    cells = [cell for name, row in own for cell in results[name].cells.get(row, {}).values()]
    wanted = sum(len(results[name].expected[row]) for name, row in own)
    seconds = sum(cell["cpu_seconds"] for cell in cells)
    versions = {f"torch {c['versions']['torch']}, transformers {c['versions']['transformers']}" for c in cells}
    made = f" with {'; '.join(sorted(versions))}" if versions else ""
    return (
        f"**What it took.** {len(cells)} of {wanted} cells (one row with one seed each) have been run, in "
        f"{seconds / 60:.0f} CPU minutes on one thread each{made}. A base of narrations that was not there yet costs a "
        "cell about 65 CPU seconds more, a base of five tasks about 155; most were made before and are not counted. "
        "`python -m studies run` runs what is missing, and may be killed at any time: it goes on where it was. No GPU "
        "was used for them.\n"
    )


def _summary(entries: Sequence[Judged], pages: str) -> str:
    lines = ["## Claims at a glance", "", "| | claim | from | found here |", "|---|---|---|---|"]
    for entry in entries:
        lines.append(
            f"| {entry.study.method} | {_cell(entry.claim.text)} | {_cell(entry.claim.source)} | "
            f"[**{entry.verdict.word}**]({pages}/{entry.study.name}.md) |"
        )
    counts = Counter(entry.verdict.word for entry in entries)
    lines += ["", "In all: " + ", ".join(f"{word} {count}" for word, count in counts.most_common()) + ".", ""]
    return "\n".join(lines)


def _list(studies: Mapping[str, Study], pages: str) -> str:
    lines = ["## Tables", ""]
    lines += [f"- [{study.title}]({pages}/{name}.md) (`{name}`)" for name, study in studies.items()]
    return "\n".join([*lines, ""])


def _page(study: Study, results: Results, verdicts: Sequence[Judged], picture: str | None, raw: str) -> str:
    lines = [f"# {study.title}", WRITTEN, ""]
    lines += ["This page has one study's table, and its verdicts. [All claims](@@), and how to read the numbers.", ""]
    lines += [f"    python -m studies run {study.name}", "", study.setting, ""]
    lines += [_table(study, results), ""]
    if picture is not None:
        lines += [f"![{study.title}; the numbers stand in the table]({picture})", ""]
    for entry in verdicts:
        lines += [
            f"- **{entry.claim.text}** ({entry.claim.source})  ",
            f"  *{entry.verdict.word}.* {entry.verdict.because}",
        ]
    if verdicts:
        lines.append("")
    own = [row for row in study.rows if row.same_as is None]
    seconds = sum(cell["cpu_seconds"] for row in own for cell in results.cells.get(row.name, {}).values())
    if seconds:
        lines += [f"{seconds / 60:.1f} CPU minutes. Raw results: [{study.name}]({raw}/{study.name}).", ""]
    return "\n".join(lines)


def _table(study: Study, results: Results) -> str:
    columns = study.columns
    lines = [
        "| | " + " | ".join(column.label for column in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for row in study.rows:
        lines.append(
            f"| {_cell(_label(row, results))} | " + " | ".join(_number(results, row, c) for c in columns) + " |"
        )
    return "\n".join(lines)


def _label(row: TableRow, results: Results) -> str:
    found, wanted = len(results.cells.get(row.name, ())), len(results.expected[row.name])
    return row.label if found == wanted or not found else f"{row.label} ({found} of {wanted} seeds)"


def _number(results: Results, row: TableRow, column: Column) -> str:
    values = list(results.values(row.name, column.key).values())
    if not values:
        return "not run" if not results.cells.get(row.name) else ""
    found: Interval = results.at(row.name, column.key)
    if column.percent:
        return f"{100 * found.mean:.1f}" + (f" ± {100 * found.half:.1f}" if found.n > 1 else "")
    return f"{found.mean:.2f}" + (f" ± {found.half:.2f}" if found.n > 1 else "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
