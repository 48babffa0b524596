"""The benchmark of training runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_it_runs_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "numbers.json"
    command = [sys.executable, str(ROOT / "benchmarks/training.py"), "--tiny", "--runs", "1", "--chunks", "3"]
    sections = ["--sections", "tf", "cd", "dmd", "attention"]
    subprocess.run([*command, *sections, "--out", str(out)], check=True, capture_output=True, timeout=300)
    found = json.loads(out.read_text())
    assert found.pop("conditions")["recompute"] == "selective"
    steps = [f"{what}, chunk 3" for what in ("teacher forcing", "causal CD", "DMD cycle")]
    assert all(found[name]["ms"] > 0 and found[name]["mfu"] >= 0 for name in steps)
    parts = found["DMD cycle, chunk 3"]["parts_ms"]
    assert {name: part["times"] for name, part in parts.items()} == {
        "before critic": 5,
        "critic pass": 5,
        "critic optimiser": 5,
        "before student": 1,
        "student pass": 1,
        "student optimiser": 1,
    }
