"""The benchmark of minutes of video, in miniature."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(out: Path, *more: str) -> dict:
    command = [sys.executable, str(ROOT / "benchmarks/long_speed.py"), "--out", str(out)]
    command += ["--model", "tiny/frame-1step", "--weights", "", "--decoder", "", "--noisy-models", "tiny/frame-1step"]
    command += ["--minutes", "0.01", "--looked-at", "3", "--clips", "9", "--runs", "1", *more]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return json.loads(out.read_text())


def test_every_policy_is_timed_and_its_cache_named(tmp_path: Path) -> None:
    found = run(tmp_path / "x.json", "--policies", "sink", "infinity-rope", "memrope")
    assert "failed" not in found and "not_begun" not in found
    rows = found["policies"]
    assert {name: row["cache"] for name, row in rows.items()} == {
        "sink": "recorded",
        "infinity-rope": "recorded",
        "memrope": "recorded",
    }
    for row in rows.values():
        (end,) = row["minutes"]
        assert 0 < end["p50_ms"] <= end["p95_ms"] and row["flat"] == 1
    calls = [row["calls"] for row in found["noisy"].values()]  # fused, plain, noisy: three chunks, the first in 8 steps
    assert calls == [10, 12, 11]


def test_nothing_is_begun_past_the_budget(tmp_path: Path) -> None:
    found = run(tmp_path / "x.json", "--policies", "sink", "--budget", "0.001")
    assert not found["policies"] and not found["noisy"]
    assert found["not_begun"][-1] == "sink" and len(found["not_begun"]) == 4
