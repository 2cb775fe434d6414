"""The figures of README and docs, written into the pages from the committed raw results.

    python tools/figures.py            # or `make docs-figures`: writes every page anew where it is out of date
    python tools/figures.py --check    # changes nothing; fails where a page is out of date or a figure has no source

A measured number stands in a page between two HTML comments, which a reader does not see:

    <!-- figure: NAME ARGUMENTS -->97.1 %<!-- /figure -->     computed by the function of that name
    <!-- told: DATE, `COMMAND` -->.58<!-- /told -->            measured then, by that; no raw file is kept
    <!-- cited: SOURCE -->65.5<!-- /cited -->                 somebody else's: a paper, its section or table

To add a figure, write a function in figure_values.py or figure_costs.py and name it in a page. Pages that
`python -m studies run` writes (docs/evidence*) are made of raw results altogether and are not looked into.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator

import figure_costs
import figure_values
from figure_values import ROOT

WRITTEN_BY_STUDIES = {ROOT / "docs" / "evidence.md"}
PAGES = [
    ROOT / "README.md",
    *sorted(set((ROOT / "docs").glob("*.md")) - WRITTEN_BY_STUDIES),
    ROOT / "benchmarks" / "README.md",
]
MARKED = re.compile(r"<!-- (figure|told|cited): (.*?) -->(.*?)<!-- /\1 -->", re.DOTALL)
TOLD = re.compile(r"\d{4}-\d\d-\d\d, .*`.+`.*")

MEASURED = re.compile(
    r"""
      (?<![\w.])[-+]?\d[\d,.]*\s?%                      # a percentage
    | ±|\+-                                             # an interval
    | \b\d+\.\d+\s?x\b | \b\d+\sx\s(?![\w(]) | \bx\s\d+\.\d+  # a ratio
    | \b\d[\d.,]*\stimes\b
    | \b\d[\d.,]*\s?(?:ms|µs|GiB|MiB|tok/s|tokens/s)\b
    | (?<![\w.\d])\.\d\d\d?\b                           # .88 of the facts
    | \[[-+]?\d+\.\d+,\s[-+]?\d+\.\d+\]                # an interval, or quartiles
    """,
    re.VERBOSE,
)
"""What a measured number looks like."""

ALLOWED = {
    r"\+2\.5 % eager and \+1\.0 % compiled": "targets",
    r"95 % (?:bootstrap )?intervals?": "the level of an interval is a setting",
    r"half of the 95 %": "the same",
    r"at least 0\.05 of task score": "a threshold",
    r"within 0\.1 %": "how closely controls are matched, asserted where they are made",
    r"0\.32 %|0\.3 %|1\.7 % of it|29 % of it|1\.3 %": "shares of parameters or bytes, from shapes",
    r"\(0\.1 for exactly": "a reward",
    r"\d+ x \d+": "a size",
    r"0\.015 x max|max\(1, KL / 0\.03\)": "a rule",
    r"(?:learning rate|rate) ten times": "a setting",
    r"4 x 100 million": "a limit",
    r"per token and block 2 x heads": "a size",
    r"\d GiB to spare": "a setting",
    r"0\.3[23]\.x": "a version",
    r"at least 3 x the rounding": "a bound of a test",
    r"16 times the visual tokens": "a size",
    r"target[^.|]*?(?:\d[\d.]* x|\d[\d.]* %)": "a target is what is wanted and not what was found",
    r"within 5 % of": "the same",
    r"(?:<=|>=) \+?\d[\d.]* (?:%|x)": "a goal, the same",
    r"each photo seen \d+ times": "from the sizes that the sentence gives",
    r"70 % of the questions": "a setting",
    r"right in at least 80 %": "a gate: what is wanted and not what was found",
}
"""Numbers that look measured and are not, as patterns, each with the reason."""


FIGURES: dict[str, Callable[..., str]] = {
    name.replace("_", "-"): found
    for module in (figure_values, figure_costs)
    for name, found in vars(module).items()
    if getattr(found, "__module__", None) == module.__name__
    and found.__annotations__.get("return") == "str"
    and not name.startswith("_")
    and name not in ("table", "thousands", "spread")
}
"""By name: the functions that return text."""


def compute(wanted: str) -> str:
    """The text of a figure, by its name and arguments.

    Raises:
        ValueError: there is none, or its raw results are not there.
    """
    name, *arguments = wanted.split()
    if name not in FIGURES:
        raise ValueError(f"figure {name!r} is unknown; tools/figures.py has {', '.join(FIGURES)}.")
    try:
        return FIGURES[name](*arguments)
    except (TypeError, KeyError, OSError, AssertionError, StopIteration, ValueError, IndexError) as error:
        raise ValueError(f"figure {wanted!r} cannot be computed: {error!r}") from error


def current(text: str) -> str:
    """A page with all its figures computed anew."""

    def renew(match: re.Match[str]) -> str:
        kind, wanted, _ = match.groups()
        if kind != "figure":
            return match.group()
        found = compute(wanted)
        found = f"\n{found}\n" if "\n" in found else found
        return f"<!-- figure: {wanted} -->{found}<!-- /figure -->"

    return MARKED.sub(renew, text)


def faults(text: str) -> Iterator[str]:
    """What is wrong with a page's figures, besides being out of date."""
    for match in MARKED.finditer(text):
        kind, what, content = match.groups()
        if kind == "told" and not TOLD.fullmatch(what):
            yield f"told: {what!r} needs `DATE, \\`COMMAND\\``"
        if "\n" not in content and text[: match.start()].rpartition("\n")[2].strip() == "":
            yield f"{match.group()!r} begins a line: markdown would show it as it stands. Put a word before it."
    if len(re.findall(r"<!-- /?(?:figure|told|cited)\b", text)) != 2 * len(MARKED.findall(text)):
        yield "a marker is not closed, or not by its own kind"
    plain = MARKED.sub("", re.sub(r"^```.*?^```|^ {4}.*?$|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE))
    for pattern in ALLOWED:
        plain = re.sub(pattern, "", plain)
    for match in MEASURED.finditer(plain):
        around = plain[max(0, match.start() - 50) : match.end() + 20].replace("\n", " ")
        yield f"{match.group().strip()!r} has no source: ...{around}..."


def main() -> None:
    """Write the pages, or only check them."""
    check, wrong = "--check" in sys.argv[1:], []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        name = page.relative_to(ROOT)
        try:
            new = current(text)
        except ValueError as error:
            wrong.append(f"{name}: {error}")
            continue
        wrong += [f"{name}: {fault}" for fault in faults(text)]
        if new != text and check:
            wrong.append(f"{name} is out of date: run `make docs-figures`")
        elif new != text:
            page.write_text(new, encoding="utf-8")
            print(f"{name}: written")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
