"""What every recipe would need: its own command with --dry-run, on the shape of its base (no weights, no network).

    python recipes/estimate.py            # prints the table of recipes/README.md
    python recipes/estimate.py --write    # and writes it there

A test runs the same, so a recipe whose flags the command line no longer knows is found.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import yaml
from typer.testing import CliRunner

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT.parent / "benchmarks"))

from shared.shapes import build_config  # noqa: E402

#: Positions of a sample, or of a question, that the estimates assume; 1,024 of them are visual.
TOKENS = {"sft": 2048, "grpo": 1536, "formation": 1536, "invocation": 1536}
BEGIN, END = "<!-- estimates -->", "<!-- end of estimates -->"


@dataclass(frozen=True)
class Recipe:
    """One script.

    Attributes:
        path: of the script.
        base: hub id of the model.
        command: arguments of `keepsight`, as the script gives them.
        config: its accelerate config file, or None for one process.
        processes: how many.
    """

    path: Path
    base: str
    command: list[str]
    config: Path | None
    processes: int

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Parse a script: comments, variables, and one command."""
        text = path.read_text()
        lines = [line for line in text.replace("\\\n", " ").splitlines() if re.match(r"(accelerate|keepsight) ", line)]
        assert len(lines) == 1, f"{path.name}: expected one command, found {len(lines)}"
        words = shlex.split(lines[0].replace('$(dirname "$0")', str(path.parent)), posix=True)
        config = Path(words[words.index("--config_file") + 1]).resolve() if "--config_file" in words else None
        command = words[words.index("train") :]
        base = re.search(r"^# Base: (\S+)$", text, re.MULTILINE)
        assert base is not None, f"{path.name} does not name its base"
        processes = 1 if config is None else int(yaml.safe_load(config.read_text())["num_processes"])
        return cls(path, base[1], command, config, processes)

    @property
    def kind(self) -> str:
        """ "sft", "grpo", "formation" or "invocation"."""
        return {"pvm": "sft", "pvm-grpo": "grpo"}.get(self.command[1], self.command[1].removeprefix("vismem-"))

    def environment(self) -> dict[str, str]:
        """What `accelerate launch` would tell every process."""
        if self.config is None:
            return {}
        found = yaml.safe_load(self.config.read_text())
        announced = {"WORLD_SIZE": str(self.processes), "RANK": "0"}
        if found["distributed_type"] == "DEEPSPEED":
            stage = str(found["deepspeed_config"]["zero_stage"])
            announced |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage}
        if found["distributed_type"] == "FSDP":
            version = str(found["fsdp_config"]["fsdp_version"])
            announced |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": version}
        return announced

    def dry_run(self, base: Path) -> str:
        """What the script's command prints with --dry-run.

        Args:
            base: a folder with the base's config.json; stands for the base, and for a memory on it.
        """
        from keepsight.cli import app

        command = [str(base) if word in (self.base, "$MEMORY") else word for word in self.command]
        for name in ("--data", "--output-dir"):
            at = command.index(name)
            assert command[at + 1] in ("$DATA", "$OUT")
            del command[at : at + 2]
        command += ["--dry-run", "--tokens", str(TOKENS[self.kind])]
        with mock.patch.dict(os.environ, self.environment() | {"COLUMNS": "200"}):
            result = CliRunner().invoke(app, command)
        if result.exit_code:
            raise RuntimeError(f"{self.path.name}: {' '.join(command)}\n{result.output}") from result.exception
        return result.output


def recipes() -> list[Recipe]:
    """All of them."""
    return [Recipe.read(path) for path in sorted(ROOT.glob("*/*.sh"))]


def make_base(name: str, folder: Path) -> Path:
    """A folder that holds nothing but the config.json of a released model's shape."""
    target = folder / name.rpartition("/")[2]
    if not target.is_dir():
        config = build_config(name)
        config.dtype = "bfloat16"
        config.save_pretrained(target)
    return target


def rows_of(output: str) -> dict[str, str]:
    """Label -> value of a dry run's table."""
    found: dict[str, str] = {}
    for line in output.splitlines():
        cells = [cell.strip() for cell in re.split(r"[│|]", line) if cell.strip()]
        if len(cells) == 2:
            found[cells[0]] = cells[1]
    return found


def line(recipe: Recipe, rows: dict[str, str]) -> str:
    """A recipe's row of the table."""
    link = recipe.path.relative_to(ROOT)
    cells = [
        f"[{link.stem}]({link})",
        str(recipe.processes),
        rows["trained"].split(" of ")[0],
        rows["together"].split(" GiB")[0],
        rows["tokens per step"],
        rows["operations per step"].split(" PFLOP")[0],
        rows["at 40 % of an H100"].split(" per step")[0],
    ]
    return f"| {' | '.join(cells)} |"


def table(found: list[tuple[Recipe, dict[str, str]]]) -> str:
    """Markdown."""
    head = [
        "| recipe | GPUs | trained parameters | GiB per GPU | tokens per step | PFLOP per step | time per step |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    return "\n".join([*head, *(line(recipe, rows) for recipe, rows in found)])


def main(argv: list[str] | None = None) -> None:
    """Print the table, and write it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        found = [(r, rows_of(r.dry_run(make_base(r.base, Path(folder))))) for r in recipes()]
    text = table(found)
    print(text)
    if args.write:
        file = ROOT / "README.md"
        before, _, rest = file.read_text().partition(BEGIN)
        file.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
