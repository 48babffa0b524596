"""`benchmarks/live_quality.py`: what its rows are called, and what it refuses."""

from __future__ import annotations

import sys

import pytest
from benchmarks import live_quality

from causalreel.infer.live import Policy
from causalreel.infer.models import profile
from causalreel.nn.policies.registry import policy_from


@pytest.mark.parametrize(
    ("model", "policy", "expected"),
    [
        ("tiny", None, "slide, infinity-rope"),
        ("tiny/chunk-4step", None, "slide, infinity-rope"),
        ("causal-forcing/chunkwise", None, "slide, window 21"),
        ("tiny", "memrope:local=5", "slide, memrope:local=5"),
        ("tiny", "sink:window=9", "slide, sink:window=9"),
        ("tiny", "window:window=6", "slide, window 6"),
    ],
)
def test_a_row_is_called_as_the_policy_in_force(model: str, policy: str | None, expected: str) -> None:
    known = profile(model)
    chunk = known.sampling.chunk or 1
    made = Policy.of(known.export, known.sampling, "slide")
    if policy is not None:
        made = Policy("slide", made.length, made.keep, policy_from(policy, frames=known.export.frames, chunk=chunk))
    assert live_quality.sliding(made, known.export.frames, chunk) == expected


def test_the_table_has_that_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(live_quality, "scores", lambda *how: [(1.0, float("nan"), 0.5)] * len(live_quality.STRETCHES))
    monkeypatch.setattr(sys, "argv", ["live_quality.py", "--streams", "1", "--only", "streams"])
    live_quality.main()
    rows = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert "| slide, infinity-rope" in rows and "| slide, window 6" in rows and "| slide" not in rows


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (["--model", "tiny/walk"], "must be one that reads the tiny world's prompts, such as tiny; got tiny/walk"),
        (["--model", "tinny"], "--model: unknown model 'tinny'"),
        (["--streams", "0"], "must be at least 1, got 0 and 16"),
        (["--chunks", "40"], "--chunks must be more than 40"),
    ],
)
def test_what_it_cannot_measure_is_said_before_it_loads(
    how: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["live_quality.py", *how])
    with pytest.raises(SystemExit):
        live_quality.main()
    assert message in capsys.readouterr().err


def test_what_nothing_is_known_of_is_no_number() -> None:
    assert live_quality.mean([float("nan"), 0.25, 0.75]) == 0.5 and live_quality.mean([float("nan")]) != 0
