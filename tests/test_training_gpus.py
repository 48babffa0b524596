"""`benchmarks/training_gpus.py` as far as it measures nothing: what it keeps, what it tries again, when it stops."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks import training_gpus

SECTIONS = ["data", "hybrid", "context", "forcing14", "resume"]
KEYS = ["data 4", "data 2", "hybrid 2 x 2", "context 2", "forcing14", "resume"]
"""Of four processes; the small network's two heads are not for four of them."""


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The runs that were made; one that shares a clip by two fails the first time."""
    made: list[dict[str, Any]] = []

    def run(self: Any, stage: str, **how: Any) -> dict[str, Any]:
        made.append({"stage": stage, **how})
        is_context = how["gpus"] == 2 and "trainer" in how
        return {"failed": "out of memory"} if is_context and sum(made[-1] == one for one in made) == 1 else {"s": 1.0}

    monkeypatch.setattr(training_gpus.Runs, "run", run)
    monkeypatch.setattr(training_gpus.Runs, "_resumed", lambda self: run(self, "resume", gpus=4))
    return made


def start(monkeypatch: pytest.MonkeyPatch, out: Path, *more: str) -> None:
    words = ["training_gpus.py", "--tiny", "--gpus", "4", "--out", str(out), "--sections", *SECTIONS, *more]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(training_gpus.signal, "signal", lambda *_: None)
    training_gpus.main()


def test_it_goes_on_where_it_stopped(
    runs: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "there" / "numbers.json"
    with pytest.raises(SystemExit, match="failed or left out: context 2"):
        start(monkeypatch, out)
    assert len(runs) == len(KEYS) and list(json.loads(out.read_text())) == ["conditions", *KEYS]
    start(monkeypatch, out)
    assert len(runs) == len(KEYS) + 1 and runs[-1]["trainer"] == {"parallel": {"context": 2}}
    start(monkeypatch, out)
    assert len(runs) == len(KEYS) + 1 and "failed" not in out.read_text()
    with pytest.raises(SystemExit, match="numbers of other conditions"):
        start(monkeypatch, out, "--chunk", "1")


def test_without_time_nothing_is_begun(
    runs: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="failed or left out: data 4, data 2, hybrid"):
        start(monkeypatch, tmp_path / "numbers.json", "--budget", "0")
    assert not runs
