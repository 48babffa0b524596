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
    first = started(tmp_path, "--smoke", "--stages", "dmd")
    assert first.returncode == 1 and "dmd begins with" in first.stderr and "run that stage first" in first.stderr
    done = started(tmp_path, "--smoke", "--stages", "ar", "cd", "--steps", "2", "--", "trainer.offload_averages=true")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert [len(found[name]["loss"]) for name in ("ar", "cd")] == [2, 2] and found["video"]["shape"][1] == 21
    assert not (tmp_path / "ar" / "checkpoints").exists() and (tmp_path / "ar" / "export").exists()
    more = started(tmp_path, "--smoke", "--stages", "ar", "ode", "cd", "--steps", "2")
    assert more.returncode == 0 and more.stdout.count("$ causalreel") == 1 and "| ode |" in more.stdout
    assert not (tmp_path / "ar" / "export").exists() and (tmp_path / "cd" / "export").exists()  # for what is left
    whole = started(tmp_path)
    assert whole.returncode == 2 and "there is no GPU here; --smoke is for CPUs" in whole.stderr
