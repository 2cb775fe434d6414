"""How the laboratory's benchmarks begin: a folder for results, and no warnings of libraries between their lines."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import transformers


def asked(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> Any:
    """The arguments, with `--out`, which is made where it is a folder."""
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore", FutureWarning)
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    (args.out.parent if args.out.suffix else args.out).mkdir(parents=True, exist_ok=True)
    return args
