"""What training holds, waits for and reads no more of than it must; and what it does not lose when it fails."""

from __future__ import annotations

import math
import types
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from causalreel.hashed import write_pickle, write_tensors
from causalreel.parallel.sharding import Team
from causalreel.train import building, state, stored
from causalreel.train import run as runs
from causalreel.train.checkpoint import complete
from causalreel.train.ingredients import Ingredients, _clips_of_student
from causalreel.train.log import NonFiniteError
from causalreel.train.readiness import disk_bytes
from causalreel.train.recipe import resolve
from causalreel.train.sharded import is_sharded, verify
from causalreel.train.stage import Loss, StepContext
from causalreel.train.stages import dmd
from causalreel.train.state import Run
from causalreel.train.stored import Store
from causalreel.train.trainer import TrainerConfig, train
from causalreel.types import LatentSpec
from patience import PATIENCE_S
from test_contents import ODE
from test_lora_training import LORA
from test_ranks import torchrun
from test_run import DATA, FROM_BASE, SMALL, made, place, reel
from test_stages import OPTIMISER, SELF_ROLLOUT, make_dmd
from test_trainer import Rows, Toy, toy_config

__all__ = ["made", "place"]  # fixtures


@pytest.mark.parametrize("samples", ["fresh", "critic"])
def test_parts_of_a_batch_hold_one_rollout_at_a_time(
    samples: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where each chunk's context is kept for replay, which is for the student's rollout alone."""
    from dataclasses import replace

    alive: list[weakref.ref[Any]] = []
    most, with_context = 0, []
    real = dmd.record_rollout

    def record_rollout(*args: Any, **how: Any) -> Any:
        nonlocal most
        record = real(*args, **how)
        alive.append(weakref.ref(record))
        most = max(most, sum(ref() is not None for ref in alive))
        with_context.append(any(one.cache is not None for one in record.exits))
        return record

    monkeypatch.setattr(dmd, "record_rollout", record_rollout)
    config = replace(SELF_ROLLOUT, batch=6, student_pass="replay", student_samples=samples)
    stage, rows = make_dmd(config)
    how = {"optimisers": {"student": OPTIMISER, "critic": OPTIMISER}, "device": "cpu", "accumulate": 3}
    train(stage, rows, TrainerConfig(out=tmp_path, steps=1, probe_every=0, **how))
    parts, critic = 3, config.critic_updates
    assert len(alive) == parts * (critic + (samples == "fresh"))
    assert sum(with_context) == (parts if samples == "fresh" else parts * critic)
    assert most == (1 if samples == "fresh" else parts)  # those of the last critic update are the student's too


WAITING = """
import time
from datetime import timedelta
from causalreel.parallel import sharding
from causalreel.parallel.mesh import join, launch
where, real = launch(), sharding._hosts
sharding._hosts = lambda patience=None: real(patience or timedelta(seconds=1))
with join(where, "cpu"):
    team, begun = sharding.Team(), []
    with team.first_alone():
        if team.is_first:
            time.sleep(3)
        begun.append(team.rank)
    assert begun == [team.rank]
"""


def test_processes_wait_longer_than_gloo_for_the_one_that_fetches(tmp_path: Path) -> None:
    (tmp_path / "waiting.py").write_text(WAITING)
    running = torchrun(2, str(tmp_path / "waiting.py"))
    _, errors = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 0, errors


def test_processes_draw_dropout_of_their_own() -> None:
    def seed(rank: int) -> int:
        team = types.SimpleNamespace(is_first=rank == 0, rank=rank)
        with torch.random.fork_rng([]):
            Run._seed(types.SimpleNamespace(team=team, config=types.SimpleNamespace(seed=1)), 0)  # type: ignore[arg-type]
            return torch.initial_seed()

    assert len({seed(rank) for rank in range(4)}) == 4


class Second(Team):
    """The second of two processes, whose first one says that all is well."""

    def __init__(self) -> None:
        super().__init__()
        self.rank, self.size = 1, 2

    def first(self, value: Any) -> Any:
        return None


def test_only_the_first_process_reads_trajectories_to_compare_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_from = {"teacher": "one"}
    rows = {"states": torch.zeros(2, 3), "text": torch.ones(2, 1, 1)}
    Store(tmp_path, made_from, False).get(2, [0], lambda first: rows)
    monkeypatch.setattr(stored, "fingerprint", lambda rows: pytest.fail("all of it is read"))
    held = Store(tmp_path, made_from, False, team=Second()).get(2, [0], lambda first: pytest.fail("made again"))
    assert held["text"].sum() == 2


def test_a_resumed_run_does_not_read_its_teacher(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reel(*ODE)
    monkeypatch.setattr(Ingredients, "filled", lambda *_: pytest.fail("the teacher is read"))
    reel(*ODE, "trainer.steps=3")


class Behind:
    """A saver whose checkpoint is still being written."""

    def __init__(self) -> None:
        self.begun, self.ended = 0, 0

    def save(self, step: int, state: Any) -> Path:
        self.begun += 1
        return Path(f"step-{step}")

    def poll(self) -> None: ...

    def finish(self) -> None:
        self.ended = self.begun


def test_a_loss_that_is_not_finite_does_not_drop_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    behind = Behind()
    monkeypatch.setattr(Run, "_make_saver", lambda self: behind)

    class Breaking(Toy):
        def loss(self, step: StepContext, *names: str) -> Any:
            compute = super().loss(step, *names)

            def broken() -> Loss:
                found, metrics = compute()
                return found * (math.nan if step.step == 7 else 1), metrics

            return broken

    with pytest.raises(NonFiniteError, match="step 8"):
        train(Breaking(), Rows(), toy_config(tmp_path, save_every=3, log_every=4))
    assert behind.begun == behind.ended == 2
    assert state.NonFiniteError is NonFiniteError


INTERRUPTED = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from causalreel.parallel.crew import crew, leave
from causalreel.parallel.mesh import join, launch
from causalreel.train import sharded, trainer
from test_ranks import run
real = trainer._take_step
def step(one, number):
    if number == 2:
        raise KeyboardInterrupt
    real(one, number)
trainer._take_step, sharded.Saver.poll = step, lambda self: None
where = launch()
try:
    with crew(where, describe=repr, report=print), join(where, "cpu"):
        try:
            run("teacher forcing", Path({out!r}), save_every=2, saves_behind=True)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
            raise
except KeyboardInterrupt:
    leave(where, 130)
"""


def test_a_second_interruption_does_not_drop_the_checkpoint_before(tmp_path: Path) -> None:
    """It is being written while the step goes on that is aborted. The processes end as those of the command do, which
    leave out what usually happens at exit, where one run in fifty under load was ended by SIGABRT."""
    script, out = tmp_path / "interrupted.py", tmp_path / "run"
    script.write_text(INTERRUPTED.format(tests=str(Path(__file__).parent), out=str(out)))
    running = torchrun(2, str(script))
    output, errors = running.communicate(timeout=PATIENCE_S)
    assert "exitcode  : 130" in errors and output.count("interrupted") == 2, output + errors
    (kept,) = complete(out / "checkpoints")
    assert kept.name == "step-00000002" and is_sharded(kept)
    verify(kept, Team())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no device that is always full")
@pytest.mark.parametrize("size", [10, 10_000_000])
def test_a_full_disk_is_called_so_whatever_is_written(size: int) -> None:
    """torch.save makes an error of its own of it, about positions in a file."""
    with pytest.raises(OSError, match="No space left"):
        write_pickle(Path("/dev/full"), {"states": torch.zeros(size)})
    with pytest.raises(OSError, match="No space left"):
        write_tensors(Path("/dev/full"), {"states": torch.zeros(size)})


def test_new_adapters_that_cannot_be_written_leave_the_old_ones(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("train", "tiny/ar", *SMALL, *DATA, *LORA, "init.student=base/export", "trainer.out=lora-run")
    reel(*command)
    before = Path("lora-run/lora/adapter_model.safetensors").read_bytes()

    def full(*args: Any, **how: Any) -> None:
        raise OSError(28, "No space left on device", "lora")

    with monkeypatch.context() as broken:
        broken.setattr(building, "write_lora", full)
        from causalreel import cli

        assert cli.main([*command, "trainer.steps=3"]) == 1
    assert Path("lora-run/lora/adapter_model.safetensors").read_bytes() == before
    reel(*command, "trainer.steps=3")
    assert sorted(path.name for path in Path("lora-run").glob("lora*")) == ["lora"]
    assert Path("lora-run/lora/adapter_model.safetensors").read_bytes() != before


def test_prompts_alone_and_a_released_student() -> None:
    assert _clips_of_student(Path("wan2.1-t2v-1.3b")) == (LatentSpec(16, 60, 104), 21)
    assert _clips_of_student(Path("random:wan-1.3b"))[1] == 21
    with pytest.raises(ValueError, match="random:tiny-smoke does not say how large the clips are"):
        _clips_of_student(Path("random:tiny-smoke"))


def test_room_on_the_disk_by_role() -> None:
    """A large frozen teacher is kept once and has no moments; adapters alone are what a checkpoint holds."""
    starts = "init={student: random:wan-1.3b, critic: random:wan-1.3b, teacher: random:wan-14b}"
    small, large = 1.419e9, 14.29e9
    count = 3  # two checkpoints, and the one that is being written
    most = 4 * (3 * 2 * small + small) * count + 4 * large + 6 * small
    assert 0.8 * most < disk_bytes(resolve("wan/dmd_14b", [starts, "trainer.keep=2", "compute=float32"])) < 1.02 * most
    adapted = ["lora.student.rank=32", "lora.critic.rank=32", "lora_merged=false"]
    assert disk_bytes(resolve("wan/dmd_14b", [starts, *adapted])) < 0.15 * 4 * 7 * small


def test_room_for_adapters_is_what_they_take(place: Path) -> None:
    keep = ("trainer.steps=4", "trainer.save_every=1", "trainer.keep=2", "trainer.out=out", *LORA, "lora_merged=false")
    command = ("tiny/causal_cd", *SMALL, *DATA, *FROM_BASE, *keep)
    estimate = disk_bytes(resolve(command[0], command[1:]))
    reel("train", *command)
    weights = [path for path in Path("out").rglob("*") if path.suffix in (".safetensors", ".pt")]
    assert estimate < 1.5 * sum(path.stat().st_size for path in weights)


@pytest.mark.parametrize("key", ["offload_averages", "offload_frozen"])
def test_recorded_calls_want_their_weights_on_the_gpu(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "choose_device", lambda name: torch.device("cuda"))
    recipe = resolve("wan/dmd", ["speed=graphed", f"trainer.{key}=true"])
    with pytest.raises(ValueError, match=rf"speed: got graphed, .*trainer\.{key}=false"):
        runs.check_processes(recipe, 1)
