"""The benchmark of training: what it counts, and that it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from causalreel.nn.masks import frames_of
from causalreel.nn.presets import preset

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from benchmarks.training import operations, per_token  # noqa: E402


def test_operations_are_those_counted_by_hand() -> None:
    """1.3B, 21 frames of 1560 tokens: 2.501 GFLOP a token in products, 0.094 over the text, 164 + 6 + 226 in all."""
    config = preset("wan-1.3b")
    assert round(per_token(config) / 1e9, 3) == round(2.501 + 0.094, 3)
    for chunk, expected in ((3, 396.1), (1, 377.3)):
        sizes = [chunk] * (21 // chunk)
        both = frames_of(sizes) + frames_of(sizes, stream=1)
        assert abs(operations(config, 1560, both, both) / 1e12 - expected) < 0.2


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
