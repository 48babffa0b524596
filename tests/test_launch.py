"""`torchrun ... -m causalreel train`: killed, stopped and short of a process, it goes on as if nothing had been."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from causalreel.cli import main
from causalreel.train.checkpoint import latest
from patience import PATIENCE_S, wait_until
from test_ranks import torchrun

STEPS = 24
RUN = (
    *("train", "tiny/causal_cd", "init={student: random:tiny-smoke, teacher: random:tiny-smoke}"),
    *("settings.batch=4", "settings.chunk=3", "trainer.device=cpu", f"trainer.steps={STEPS}", "trainer.save_every=1"),
    *("trainer.log_every=1", "trainer.optimisers.student.schedule=constant", "trainer.keep=3"),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data, and the folder `whole` of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("launch")
    assert main(["encode", "--codec", "tiny", "--out", str(folder / "data"), "--clips", "8"]) == 0
    running = start(folder, "whole")
    _, errors = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 0, errors
    return folder


def start(place: Path, out: str, *more: str) -> subprocess.Popen[str]:
    return torchrun(2, "-m", "causalreel", *RUN, f"data={place / 'data'}", f"trainer.out={place / out}", *more)


def steps(out: Path) -> int:
    found = latest(out / "checkpoints")
    return 0 if found is None else int(found.name.removeprefix("step-"))


def stopped(place: Path, out: str, stop: Callable[[subprocess.Popen[str]], None]) -> str:
    """Start, wait until two more steps are saved, stop, and wait until all are gone -> what was said."""
    after = steps(place / out) + 2
    running = start(place, out)
    wait_until(lambda: running.poll() is not None or steps(place / out) >= after, f"step {after}")
    stop(running)
    _, errors = running.communicate(timeout=PATIENCE_S)
    assert steps(place / out) < STEPS, "it was over before it could be stopped"
    return errors


def kill_all(running: subprocess.Popen[str]) -> None:
    os.killpg(running.pid, signal.SIGKILL)
    for child in children(running.pid):
        os.kill(child, signal.SIGKILL)


def kill_one(running: subprocess.Popen[str]) -> None:
    os.kill(children(running.pid)[-1], signal.SIGKILL)


def terminate(running: subprocess.Popen[str]) -> None:
    """To all processes, of which the launcher sends it to the others once more."""
    for child in children(running.pid):
        os.kill(child, signal.SIGTERM)
    running.send_signal(signal.SIGTERM)


def tensors(path: Path) -> dict[str, Tensor]:
    """Everything that changes, of a checkpoint of several processes."""
    facts = FileSystemReader(path).read_metadata().state_dict_metadata
    found = {name: torch.empty(fact.size, dtype=fact.properties.dtype) for name, fact in facts.items()}
    load(found, storage_reader=FileSystemReader(path), no_dist=True)
    return found


def children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sorted(map(int, listed))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes by Linux's /proc")
def test_it_goes_on_bit_for_bit(place: Path) -> None:
    """After SIGKILL to all, the death of one process, and SIGTERM, which saves first."""
    out = place / "parts"
    stopped(place, "parts", kill_all)
    stopped(place, "parts", kill_one)
    said = stopped(place, "parts", terminate)
    assert f"stopped after step {steps(out)};" in said, said
    running = start(place, "parts")
    _, errors = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 0 and "resumed" in errors, errors
    ends = [latest(place / name / "checkpoints") for name in ("whole", "parts")]
    assert ends[0] is not None and ends[1] is not None and ends[0].name == ends[1].name
    states = [tensors(end) for end in ends if end is not None]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    one, two = (torch.load(end / "trainer.pt", weights_only=True) for end in ends if end)
    assert one["position"] == two["position"]
    models = [load_file(place / name / "export" / "model.safetensors") for name in ("whole", "parts")]
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


def test_a_recipe_for_more_processes_says_which_key_to_change(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = [f"data={place / 'data'}", f"trainer.out={place / 'none'}"]
    for more, told in (
        (["trainer.parallel.shard=8"], "needs 8 processes, this launch has 1.*trainer.parallel.shard=null"),
        (
            ["trainer.parallel.replicate=2"],
            "a multiple of 2 processes, this launch has 1.*trainer.parallel.replicate=1",
        ),
        (["trainer.parallel.context=2"], "a multiple of 2 processes, this launch has 1.*trainer.parallel.context=1"),
        (["trainer.accumulate=3"], "settings.batch: got 4.*take a multiple of 3"),
        (["trainer.parallel.shard=0"], "shard: got 0, allowed 1 or more"),
    ):
        assert main([*RUN, *where, *more]) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1 and re.search(told, said[0]), said
    assert not (place / "none").exists()


def test_an_error_in_one_process_is_one_line(place: Path) -> None:
    """A checkpoint that the second process alone finds damaged."""
    shutil.copytree(place / "whole", place / "damaged")
    end = latest(place / "damaged" / "checkpoints")
    assert end is not None
    part = end / "__1_0.distcp"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    running = start(place, "damaged", f"trainer.steps={STEPS + 1}")
    _, errors = running.communicate(timeout=PATIENCE_S)
    ours = [line for line in errors.splitlines() if line.startswith("causalreel: error")]
    assert running.returncode != 0 and len(ours) == 1 and "__1_0.distcp is damaged" in ours[0], errors
