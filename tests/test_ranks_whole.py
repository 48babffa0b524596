"""Law 10 for every stage and its variants, by two and by four processes, with the optimiser that recipes have: minutes.

As `test_ranks`, whose cases these are, with networks of three blocks, every stage resumed. Runs with `pytest --whole`.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import test_ranks
import test_stages
from causalreel.parallel.sharding import ParallelConfig
from causalreel.train.stage import DataSource, Stage
from patience import PATIENCE_S
from test_ranks import CASES, DMD, assert_same, run, torchrun
from test_stages import OPTIMISER, make_dmd

pytestmark = pytest.mark.whole

HERE = Path(__file__).resolve()
WAYS = {"rows": ParallelConfig(), "tokens": ParallelConfig(context=2)}
MORE: dict[str, Callable[[], tuple[Stage, DataSource]]] = {
    "DMD, repeated samples": lambda: make_dmd(dataclasses.replace(DMD, critic_repeats=2, student_samples="critic")),
    "DMD, shared exits": lambda: make_dmd(dataclasses.replace(DMD, exits="shared")),
    "DMD, long": lambda: make_dmd(dataclasses.replace(DMD, longest=7)),
    "DMD, rolling": lambda: make_dmd(
        dataclasses.replace(DMD, rolling=0.5, longest=6, student_pass="replay", critic_rollouts=1)
    ),
}
NAMES = [*CASES, *MORE]
SHARED = [(how, name) for how in WAYS for name in NAMES if how != "tokens" or "codec" not in name]


def larger(patch: pytest.MonkeyPatch) -> None:
    """Networks of three blocks, and the optimiser as it is, whose steps hardly depend on the size of gradients."""
    patch.setattr(test_ranks, "CASES", {**CASES, **MORE})
    patch.setattr(test_stages, "CONFIG", dataclasses.replace(test_stages.CONFIG, layers=3))
    patch.setattr(test_ranks, "STEADY", OPTIMISER)


def process(folder: str) -> None:
    """What each of the processes does."""
    from causalreel.parallel.mesh import join, launch

    where, found = launch(), {}
    assert where is not None
    with pytest.MonkeyPatch.context() as patch, join(where, "cpu"):
        larger(patch)
        for how, name in SHARED:
            found[how, name] = run(name, Path(folder) / how / name, parallel=WAYS[how])
        for name in NAMES:
            out = Path(folder) / "stopped" / name
            run(name, out, steps=2, save_every=1)
            if where.size == 2:
                found["resumed", name] = run(name, out)
        for out in (Path(folder) / "given").glob("*"):
            found["from four", out.name] = run(out.name, out)
    torch.save(found, f"{folder}/{where.rank}.pt")


def launched(folder: Path, count: int) -> list[dict]:
    """What each process found, by rank."""
    running = torchrun(count, str(HERE), str(folder))
    output, errors = running.communicate(timeout=10 * PATIENCE_S)
    assert running.returncode == 0, output + errors
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("four")
    return folder, launched(folder, 4)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, four: tuple[Path, list[dict]]) -> list[dict]:
    """Two processes, which also go on with what four have begun."""
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(four[0] / "stopped", folder / "given")
    return launched(folder, 2)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    with pytest.MonkeyPatch.context() as patch:
        larger(patch)
        return {name: run(name, tmp_path_factory.mktemp("alone")) for name in NAMES}


def assert_near(one: dict, other: dict) -> None:
    """Losses to 1e-6, weights of each role to 1e-5, relative."""
    for a, b in zip(one["records"], other["records"], strict=True):
        for key in (key for key in a if key.endswith("/loss")):
            assert a[key] == pytest.approx(b[key], rel=1e-6), (key, a["step"])
    for role in dict.fromkeys(key.split(".")[0] for key in one["weights"]):
        mine, theirs = (
            torch.cat([v.flatten().float() for k, v in run["weights"].items() if k.startswith(f"{role}.")])
            for run in (one, other)
        )
        assert (mine - theirs).norm() < 1e-5 * mine.norm(), role


@pytest.mark.parametrize(("how", "name"), SHARED)
def test_two_processes_are_one(how: str, name: str, two: list[dict], alone: dict[str, dict]) -> None:
    for found in two:
        assert_near(alone[name], found[how, name])


@pytest.mark.parametrize(("how", "name"), SHARED)
def test_four_processes_are_one(how: str, name: str, four: tuple[Path, list[dict]], alone: dict[str, dict]) -> None:
    for found in four[1]:
        assert_near(alone[name], found[how, name])


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_go_on_bit_for_bit(name: str, two: list[dict]) -> None:
    for found in two:
        assert_same(found["rows", name], found["resumed", name])


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_go_on_with_what_four_began(name: str, two: list[dict], alone: dict[str, dict]) -> None:
    assert_near(alone[name], two[0]["from four", name])


if __name__ == "__main__":
    process(sys.argv[1])
