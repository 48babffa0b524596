"""`runs/wan_smoke.py` in miniature: what it starts, prints, skips and keeps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[1]


def started(out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "runs" / "wan_smoke.py"), "--out", str(out), *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE_S)


def test_stages_one_after_the_other(tmp_path: Path) -> None:
    out, told = tmp_path / "out", tmp_path / "told" / "results.json"
    first = started(out, "--smoke", "--stages", "dmd")
    assert first.returncode == 1 and "dmd begins with" in first.stderr and "run that stage first" in first.stderr
    done = started(out, "--smoke", "--stages", "ar", "cd", "--steps", "2", "--", "trainer.offload_averages=true")
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "results.json").read_text())
    assert [len(found[name]["loss"]) for name in ("ar", "cd")] == [2, 2] and found["video"]["shape"][1] == 21
    assert not (out / "ar" / "checkpoints").exists() and (out / "ar" / "export").exists()
    again = ("--smoke", "--stages", "ar", "ode", "cd", "--results", str(told))
    more = started(out, *again, "--steps", "2", "--", "trainer.offload_averages=true")
    assert more.returncode == 0 and more.stdout.count("$ causalreel train") == 1 and "| ode |" in more.stdout
    assert not (out / "ar" / "export").exists() and (out / "cd" / "export").exists()  # for what is left
    assert json.loads(told.read_text()) == json.loads((out / "results.json").read_text())
    whole = started(out)
    assert whole.returncode == 2 and "there is no GPU here; --smoke is for CPUs" in whole.stderr


def test_other_settings_are_another_run_and_a_failure_stops_only_what_needs_it(tmp_path: Path) -> None:
    few = started(tmp_path, "--smoke", "--stages", "ar", "--steps", "1")
    assert few.returncode == 0, few.stderr
    mixed = started(tmp_path, "--smoke", "--stages", "ar", "ode", "--steps", "2", "--", "settings.grid=5")
    found = json.loads((tmp_path / "results.json").read_text())
    assert mixed.returncode == 1 and "unknown key 'grid' in settings" in found["ar"]["failed"]
    assert len(found["ode"]["loss"]) == 2
    late = started(tmp_path, "--smoke", "--stages", "ar", "ode", "--limit", "0.2")
    found = json.loads((tmp_path / "results.json").read_text())
    assert late.returncode == 1 and found["ar"]["failed"].startswith("took longer than 0.2 s")
    assert "loss" not in found["ar"] and "| ar |" in late.stdout and "ar failed: took" in late.stdout
