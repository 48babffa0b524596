"""Law 9: save + resume = uninterrupted, bit for bit; and what kills, full disks and damaged files leave behind."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from causalreel import config, files, hashed
from causalreel.train import checkpoint
from causalreel.train.contents import Content
from causalreel.train.optim import OptimiserConfig
from causalreel.train.stage import Average
from causalreel.train.trainer import TrainerConfig, train
from patience import PATIENCE_S
from test_trainer import OPTIMISERS, Rows, Toy, metrics, toy_config, weights

CLOCK = {"seconds", "steps_per_second", "tokens_per_second", "tflops_per_gpu", "data_wait", "host_memory_gib"}


def untimed(out: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in record.items() if k not in CLOCK} for record in metrics(out)]


def stored_at(out: Path) -> Path:
    path = checkpoint.latest(out / "checkpoints")
    assert path is not None
    return path


def stored(out: Path, *, is_checked: bool = True) -> checkpoint.State:
    return checkpoint.load(stored_at(out), is_checked=is_checked)


def assert_same(one: Any, two: Any) -> None:
    """Equal bit for bit, through dicts and lists, but for the clock."""
    assert type(one) is type(two)
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one.keys() - {"seconds", "recorded", "aside"}:
            assert_same(one[key], two[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two)
        for left, right in zip(one, two, strict=True):
            assert_same(left, right)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
    else:
        assert one == two or one != one


def assert_same_run(one: Path, two: Path) -> None:
    states = stored(one), stored(two)
    assert_same(states[0].roles, states[1].roles)
    assert_same(states[0].trainer, states[1].trainer)
    assert untimed(one) == untimed(two)


@pytest.mark.parametrize("stops", [(3, 9), (4, 5), (1, 2)])
def test_resumed_is_uninterrupted(tmp_path: Path, stops: tuple[int, ...]) -> None:
    """Also where a stop falls inside a metrics window (of three steps) and inside an epoch."""
    whole = Toy()
    train(whole, Rows(), toy_config(tmp_path / "whole"))
    for number, stop in enumerate(stops):
        interrupt = Toy(lambda step, stop=stop: os.kill(os.getpid(), signal.SIGINT) if step == stop - 1 else None)
        assert train(interrupt, Rows(), toy_config(tmp_path / "parts")).step == stop, number
    last = Toy()
    torch.rand(5)
    assert train(last, Rows(), toy_config(tmp_path / "parts")).step == 12
    assert_same(weights(whole), weights(last))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_finished_run_has_nothing_to_do_until_steps_are_raised(tmp_path: Path) -> None:
    constant = {"optimisers": {role: replace(o, schedule="constant") for role, o in OPTIMISERS.items()}}
    train(Toy(), Rows(), toy_config(tmp_path / "whole", 12, **constant))
    train(Toy(), Rows(), toy_config(tmp_path / "parts", 6, **constant))
    before = (tmp_path / "parts" / "metrics.jsonl").read_text()
    assert train(Toy(), Rows(), toy_config(tmp_path / "parts", 6, **constant)).step == 6
    assert (tmp_path / "parts" / "metrics.jsonl").read_text() == before
    train(Toy(), Rows(), toy_config(tmp_path / "parts", 12, save_every=5, keep=1, **constant))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


PROGRAM = """
import sys, time
from pathlib import Path
from test_trainer import *
stage = Toy(lambda step: (print(step, flush=True), time.sleep(0.01)))
raise SystemExit(train(stage, Rows(), toy_config(Path(sys.argv[1]), 40, save_every=3)).exit_code)
"""


def command(out: Path) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(out)], env=environment, stdout=subprocess.PIPE, text=True
    )


def test_killed_at_random_and_started_again(tmp_path: Path) -> None:
    """Real SIGKILLs, some of them while a checkpoint is being written, then the same command again."""
    chance = random.Random(0)
    for _ in range(3):
        process = command(tmp_path / "killed")
        assert process.stdout is not None
        for _ in range(chance.randint(5, 12)):
            process.stdout.readline()
        time.sleep(chance.random() * 0.03)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
    process = command(tmp_path / "killed")
    first = process.communicate(timeout=PATIENCE_S)[0].split()[0]
    assert process.returncode == 0 and int(first) > 0
    train(Toy(), Rows(), toy_config(tmp_path / "whole", 40, save_every=3))
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert not list((tmp_path / "killed" / "checkpoints").glob(".*"))


@pytest.mark.parametrize("broken", ["replace", "write", "_flush"])
def test_a_full_disk_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    train(Toy(), Rows(), toy_config(tmp_path, 3))
    before = stored(tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    def refuse(*paths: object, **how: object) -> None:
        return fail() if "checkpoints" in str(paths) else real(*paths, **how)

    target = {"replace": files.os, "write": hashed.HashedFile, "_flush": files}[broken]
    real = getattr(target, broken)
    with monkeypatch.context() as patch:
        patch.setattr(target, broken, fail if broken == "write" else refuse)
        with pytest.raises(
            OSError, match=r"step-00000004 could not be written \(No space[^(]*\); .*step-00000003 is intact"
        ):
            train(Toy(), Rows(), toy_config(tmp_path, save_every=1, keep=1))
    assert_same(before.roles, stored(tmp_path).roles)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


@pytest.mark.parametrize(
    "name", [*("trainer.pt", "student.safetensors", "teacher.safetensors", "config.yaml", "manifest.json")]
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    train(Toy(), Rows(), toy_config(tmp_path, 3, save_every=1))
    file = tmp_path / "checkpoints" / "step-00000003" / name
    contents = file.read_bytes()
    flipped = bytearray(contents)
    flipped[len(contents) // 2] ^= 1
    for damaged in (contents[: len(contents) // 2], b"\xff" * len(contents), bytes(flipped), None):
        if damaged is None:
            file.unlink()
        else:
            file.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{re.escape(name)}.*delete .*step-00000003 to go on from step-00000002"):
            train(Toy(), Rows(), toy_config(tmp_path))


def test_files_of_another_step_are_named(tmp_path: Path) -> None:
    train(Toy(), Rows(), toy_config(tmp_path, 3, save_every=1, keep=3))
    one, _, three = sorted((tmp_path / "checkpoints").iterdir())
    good = (three / "student.safetensors").read_bytes()
    shutil.copy(one / "student.safetensors", three / "student.safetensors")
    with pytest.raises(ValueError, match=r"step-00000003/student.safetensors is damaged: its contents are not those"):
        train(Toy(), Rows(), toy_config(tmp_path))
    (three / "student.safetensors").write_bytes(good)
    three.rename(three.with_name("step-00000008"))
    with pytest.raises(ValueError, match=r"step-00000008 holds a checkpoint of step 3"):
        train(Toy(), Rows(), toy_config(tmp_path))


def test_without_checks_nothing_is_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(Toy(), Rows(), toy_config(tmp_path, 3), contents=[Content("data", "here", "1234")])
    monkeypatch.setattr(checkpoint, "sha256_of", lambda path: pytest.fail("hashed"))
    train(Toy(), Rows(), toy_config(tmp_path, 4, check=False))
    assert stored(tmp_path, is_checked=False).contents == {"data": "1234"}  # what was known stays known


def test_fewer_steps_than_are_done_is_an_error(tmp_path: Path) -> None:
    train(Toy(), Rows(), toy_config(tmp_path, 3))
    with pytest.raises(ValueError, match=r"steps: got 2, but .*step-00000003 has 3; ask for 3 or more"):
        train(Toy(), Rows(), toy_config(tmp_path, 2))


def test_other_contents_are_named_and_other_places_are_not(tmp_path: Path) -> None:
    def contents(place: str, data: str, teacher: str = "t") -> list[Content]:
        return [Content("data", place, data), Content("init.teacher", "there", teacher)]

    train(Toy(), Rows(), toy_config(tmp_path, 3), contents=contents("here", "1234"))
    train(Toy(), Rows(), toy_config(tmp_path, 4), contents=contents("/mnt/elsewhere", "1234"))
    for other, message in (
        (contents("here", "5678"), r"data: here is not what .*step-00000004 was made from \(1234 there, 5678 here\)"),
        (contents("here", "1234", "u"), r"init.teacher: there is not what"),
    ):
        with pytest.raises(ValueError, match=message):
            train(Toy(), Rows(), toy_config(tmp_path, 5), contents=other)


def test_a_checkpoint_older_than_hashes_and_contents_resumes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without hashes and fingerprints, the places of data and weights among its settings, no time aside."""
    train(Toy(), Rows(), toy_config(tmp_path / "old", 3))
    path = stored_at(tmp_path / "old")
    manifest = json.loads((path / "manifest.json").read_text())
    for name in ("sha256", "seal", "contents"):
        del manifest[name]
    manifest["fixed"] |= {"data": "/gone", "init.teacher": "/gone", "compute": "auto"}
    trainer = torch.load(path / "trainer.pt", weights_only=True)
    del trainer["aside"]
    torch.save(trainer, path / "trainer.pt")
    manifest["bytes"]["trainer.pt"] = (path / "trainer.pt").stat().st_size
    (path / "manifest.json").write_text(json.dumps(manifest))
    contents = [Content("data", "here", "1234")]
    with caplog.at_level("INFO"):
        for steps in (4, 12):
            constant = toy_config(tmp_path / "old", steps, save_every=1)
            train(Toy(), Rows(), constant, contents=contents)
    assert caplog.text.count("cannot be compared") == 1
    assert stored(tmp_path / "old").contents == {"data": "1234"}


def test_leftovers_are_ignored_and_cleaned(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    train(Toy(), Rows(), toy_config(tmp_path, 3))
    for machine, pid in (("0" * 8, 1), (files._where(), 2**22 + 1)):  # of another machine, and of this one
        half = directory / f".causalreel-{machine}-{pid}-12345678.partial"
        half.mkdir()
        (half / "student.safetensors").write_text("half")
    (directory / "notes").mkdir()
    assert checkpoint.latest(directory) == directory / "step-00000003"
    train(Toy(), Rows(), toy_config(tmp_path, 3))
    assert sorted(path.name for path in directory.iterdir()) == ["notes", "step-00000003"]


def test_only_the_newest_are_kept_and_frozen_roles_take_room_once(tmp_path: Path) -> None:
    train(Toy(), Rows(), toy_config(tmp_path, 5, save_every=1, keep=2))
    kept = sorted((tmp_path / "checkpoints").iterdir())
    assert [path.name for path in kept] == ["step-00000004", "step-00000005"]
    assert kept[0].joinpath("teacher.safetensors").samefile(kept[1] / "teacher.safetensors")
    assert not kept[0].joinpath("average.safetensors").samefile(kept[1] / "average.safetensors")
    assert {path.name for path in kept[1].iterdir()} >= {"config.yaml", "manifest.json", "trainer.pt"}


@dataclass(frozen=True)
class Recipe:
    """A run config: what the trainer does not know, and the trainer's part."""

    width: int
    trainer: TrainerConfig


def test_another_config_is_an_error_that_names_the_keys(tmp_path: Path) -> None:
    here = toy_config(tmp_path, 3)
    train(Toy(), Rows(), here, recipe=Recipe(8, here))
    saved = checkpoint.latest(tmp_path / "checkpoints")
    assert saved is not None
    assert config.load(saved / "config.yaml", Recipe) == Recipe(8, here)
    slower = {**OPTIMISERS, "critic": OptimiserConfig(0.5e-2)}
    other = toy_config(tmp_path, 5, optimisers=slower, save_every=7)
    with pytest.raises(
        ValueError, match=r"width \(8 there, 16 here\), trainer.optimisers.critic.lr \(0.01 there, 0.005 "
    ):
        train(Toy(), Rows(), other, recipe=Recipe(16, other))
    with pytest.raises(ValueError, match=r"had 64 rows, now 65"):
        train(Toy(), Rows(65), here, recipe=Recipe(8, here))


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5


@dataclass(frozen=True)
class Later(Recipe):
    """The same with settings that older checkpoints do not know."""

    kind: str = "flat"
    inner: Inner = Inner()
    other: Inner | None = None
    parts: dict[str, Inner] = field(default_factory=dict)


def test_a_checkpoint_older_than_a_setting_has_its_default(tmp_path: Path) -> None:
    here = toy_config(tmp_path / "old", 3)
    train(Toy(), Rows(), here, recipe=Recipe(8, here))
    more = toy_config(tmp_path / "old", 6)
    for changed, message in (
        (Later(8, more, kind="deep"), r"kind \('flat' there, 'deep' here\)"),
        (Later(8, more, inner=Inner(0.25)), r"inner.rate \(0.5 there, 0.25 here\)"),
        (Later(8, more, other=Inner()), r"other.rate \('absent' there, 0.5 here\)"),
        (Later(8, more, parts={"new": Inner()}), r"parts.new.rate \('absent' there, 0.5 here\)"),
    ):
        with pytest.raises(ValueError, match=message):
            train(Toy(), Rows(), more, recipe=changed)
    train(Toy(), Rows(), more, recipe=Later(8, more))
    whole = toy_config(tmp_path / "whole", 6)
    train(Toy(), Rows(), whole, recipe=Later(8, whole))
    resumed, straight = (stored(tmp_path / name) for name in ("old", "whole"))
    for role, tensors in straight.roles.items():
        assert all(torch.equal(tensor, resumed.roles[role][name]) for name, tensor in tensors.items())
    with pytest.raises(ValueError, match="kind"):  # a checkpoint that knows a setting keeps its own
        train(Toy(), Rows(), whole, recipe=Later(8, whole, kind="deep"))


def test_other_weights_are_errors_that_name_the_first_key(tmp_path: Path) -> None:
    train(Toy(), Rows(), toy_config(tmp_path, 3))
    for change, message in (
        (
            lambda stage: stage.roles["teacher"].register_buffer("b", torch.zeros(1)),
            r"role 'teacher': 1 missing keys, first 'b'",
        ),
        (lambda stage: stage.roles["teacher"].pop(3), r"role 'teacher': 2 unexpected keys, first '3.bias'"),
        (lambda stage: stage.roles["teacher"].__setitem__(3, nn.Linear(8, 3)), r"3.weight is .*\(2, 8\).*\(3, 8\)"),
        (lambda stage: stage.roles.pop("teacher"), r"has the roles .*'teacher'"),
    ):
        stage = Toy()
        change(stage)
        with pytest.raises(ValueError, match=message):
            train(stage, Rows(), toy_config(tmp_path, 6))


def test_tied_weights_survive(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    module.register_buffer("part", torch.arange(10.0)[2:4])
    path = checkpoint.save(tmp_path, 1, checkpoint.State({"student": module.state_dict()}, {}, ""))
    loaded = checkpoint.load(path).roles["student"]
    assert_same({**module.state_dict()}, {key: loaded[key] for key in module.state_dict()})


def test_an_average_must_match_its_source(tmp_path: Path) -> None:
    stage = Toy()
    stage.averages.append(Average("teacher", "student", 0.5))
    stage.roles["teacher"][0] = nn.Linear(2, 9)
    with pytest.raises(ValueError, match=r"average 'teacher': 0\.bias differs"):
        train(stage, Rows(), toy_config(tmp_path))
