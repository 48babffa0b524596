"""`runs/speedrun.sh` and `runs/walk.sh` with a stand-in for the package: what starts, in which order, how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from patience import PATIENCE_S, wait_until

SCRIPT, WALK = (Path(__file__).resolve().parents[1] / "runs" / name for name in ("speedrun.sh", "walk.sh"))
TRAININGS = {
    *("codec", "base", "ar-frame", "ar-chunk", "ode-frame", "ode-chunk", "cd-frame", "cd-chunk"),
    *("frame-2step", "frame-1step", "chunk-4step"),
}
STAND_IN = """#!/usr/bin/env bash
shift 2
said() { echo "$*" >>"$LOG"; }
case $1 in
  train)
    for word in "$@"; do case $word in trainer.out=*) out=${word#trainer.out=} ;; esac; done
    name=$(basename "$out")
    trap 'said "TERM $name"; sleep 0.5; said "saved $name"; exit 130' TERM
    said "begin $name $*"
    [ "$name" != "${FAILS:-}" ] || exit 2
    [[ " ${WAITS:-} " != *" $name "* ]] || for _ in $(seq 6000); do sleep 0.05; done
    mkdir -p "$out/export"
    touch "$out/export/config.yaml" "$out/export/codec.yaml" "$out/export/codec.safetensors"
    said "end $name" ;;
  encode) while [ "$1" != --out ]; do shift; done; mkdir -p "$2"; said "begin data"; said "end data" ;;
  export) mkdir -p "$3"; echo "out: $RUN/x" >"$3/config.yaml"; said "begin $*" ;;
  *) said "begin $*" ;;
esac
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    stand_in = tmp_path / "bin" / "python3"
    stand_in.parent.mkdir()
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    path = f"{stand_in.parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "RUN": str(tmp_path / "run"), "LOG": str(tmp_path / "log")}


def run(environment: dict[str, str], script: Path = SCRIPT, **more: str) -> subprocess.CompletedProcess[str]:
    how: dict = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": PATIENCE_S}
    return subprocess.run(["bash", str(script)], env={**environment, **more}, check=False, **how)


def log(environment: dict[str, str]) -> list[str]:
    path = Path(environment["LOG"])
    return path.read_text().splitlines() if path.exists() else []


def names(environment: dict[str, str], what: str) -> list[str]:
    return [line.split()[1] for line in log(environment) if line.startswith(f"{what} ")]


def test_everything_runs_once_behind_what_it_needs(environment: dict[str, str]) -> None:
    assert run(environment).returncode == 0
    begun = names(environment, "begin")
    assert sorted(begun) == sorted([*TRAININGS, "data", "eval", *["export"] * 6])
    lines = [" ".join(line.split()[:2]) for line in log(environment)]
    needs = {"data": "codec", "base": "data", "ar-frame": "base", "ar-chunk": "base", "ode-frame": "ar-frame"}
    needs |= {"cd-chunk": "ar-chunk", "frame-2step": "ode-frame", "chunk-4step": "ode-chunk", "eval": "frame-1step"}
    for later, earlier in needs.items():
        assert lines.index(f"begin {later}") > lines.index(f"end {earlier}"), (later, earlier)
    (two_step,) = (line for line in log(environment) if line.startswith("begin frame-2step"))
    assert f"init.student={environment['RUN']}/ode-frame/export" in two_step and "train tiny/dmd " in two_step
    assert run(environment).returncode == 0  # again: what has been trained stays
    assert sorted(names(environment, "begin")) == sorted([*begun, "eval", *["export"] * 6])


def test_stages_can_be_chosen(environment: dict[str, str]) -> None:
    assert run(environment, STAGES="codec data base").returncode == 0
    assert names(environment, "begin") == ["codec", "data", "base"]
    assert run(environment, STAGES="ar cd dmd", INIT="cd").returncode == 0
    assert set(names(environment, "begin")) == TRAININGS - {"ode-frame", "ode-chunk"} | {"data"}
    assert f"{environment['RUN']}/cd-frame/export" in "\n".join(log(environment))
    wrong = run(environment, STAGES="codec bsae")
    assert wrong.returncode == 2 and "unknown stage bsae" in wrong.stderr


@pytest.mark.parametrize("fails", ["base", "cd-frame", "chunk-4step"])
def test_what_fails_is_not_evaluated(environment: dict[str, str], fails: str) -> None:
    assert run(environment, FAILS=fails).returncode != 0
    begun = names(environment, "begin")
    assert fails in begun and "eval" not in begun and "export" not in begun
    if fails == "cd-frame":  # the other kind goes on to its end
        assert "chunk-4step" in begun and "frame-2step" not in begun


def test_a_signal_reaches_every_training_once(environment: dict[str, str]) -> None:
    waits = {"ode-frame", "cd-frame", "ar-chunk"}
    process = subprocess.Popen(
        ["bash", str(SCRIPT)],
        env={**environment, "WAITS": " ".join(waits)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_until(lambda: waits <= set(names(environment, "begin")), lambda: log(environment))
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 130
    finally:
        process.kill()
    assert sorted(names(environment, "TERM")) == sorted(waits)
    assert sorted(names(environment, "saved")) == sorted(waits)  # the script has waited for them
    assert not {"eval", "chunk-4step", "frame-2step"} & set(names(environment, "begin"))


def test_the_walk_ships_what_there_is(environment: dict[str, str]) -> None:
    """Up to causal CD its student, after stage 3, from the same folder, that stage's: in two steps and in one."""
    assert run(environment, WALK, STAGES="codec data base ar cd eval embed").returncode == 0
    assert names(environment, "begin") == ["codec", "data", "base", "ar", "cd", "eval", "export", "export"]
    *_, evaluated, two, one = log(environment)
    assert "CD-2step=" in evaluated and "DMD" not in evaluated
    assert "/cd/export " in two and "--name tiny/walk " in two and two.endswith("--steps 2")
    assert "/cd/export " in one and "--label CD-1step " in one and "--steps 1 --weights-of walk" in one
    assert run(environment, WALK, STAGES="dmd eval embed").returncode == 0
    begun = names(environment, "begin")[8:]
    assert sorted(begun[:3]) == ["1step", "2step", "direct"] and begun[3:] == ["eval", "export", "export"]
    *_, evaluated, two, one = log(environment)
    assert "CD-2step=" in evaluated and "DMD-1step=" in evaluated and "/direct/export@1" in evaluated
    assert "/direct/export " in two and "--name tiny/walk " in two and "--label DMD-2step-from-AR " in two
    assert "/direct/export " in one and "--name tiny/walk-1step " in one and "--label DMD-1step-from-AR " in one
    assert one.endswith("--codec ../walk/codec.safetensors --steps 1 --weights-of walk")
    card = Path(environment["RUN"]) / "assets/walk/config.yaml"
    assert card.read_text() == "out: runs/walk/x\n" and (card.parent / "codec.safetensors").is_file()
