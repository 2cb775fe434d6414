"""The process behind `answers.py`: reads [given, expected] as lines of JSON, answers true or false.

Run as a script, never imported, so that it starts without torch. Whoever started it ends it if it takes too long.
"""

from __future__ import annotations

import json
import logging
import sys


def main() -> None:
    """Answer until there are no more questions."""
    sys.path.pop(0)  # this file's folder, whose names are none of the libraries' business
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    print("ready", flush=True)
    for line in sys.stdin:
        given, expected = json.loads(line)
        try:
            # Bare formulas are put between dollars, which tells math-verify that all of it is LaTeX.
            right = parse(f"${expected}$", parsing_timeout=None) or parse(expected, parsing_timeout=None)
            said = parse(f"${given}$", parsing_timeout=None), parse(given, parsing_timeout=None)
            same = any(bool(verify(right, one, timeout_seconds=None)) for one in said if right and one)
        except Exception:  # whatever a model writes, it can only be wrong
            same = False
        print(json.dumps(same), flush=True)


if __name__ == "__main__":
    main()
