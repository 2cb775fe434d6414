"""The soak test, for twenty seconds; `python benchmarks/soak.py --minutes 10` is the long one."""

import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))  # as Python does for benchmarks/soak.py
soak = importlib.import_module("soak")


def test_good_bad_huge_slow_and_leaving_clients_at_once(tmp_path):
    status = soak.main(["--minutes", "0.33", "--workers", "8", "--growth", "24", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "soak.json").read_text())["result"]
    assert result["faults"] == []
    assert status == 0
    assert {"good", "bad", "huge", "slow", "leaving"} <= set(result["requests"])
