"""Law 10: what shares the rows of a batch changes no number: processes, and parts that follow one another.

The processes are real ones, started once for each number of them, with gloo on the CPU.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from causalreel.codecs.tiny import tiny_codec
from causalreel.data.sources import ClipSource, LatentSource
from causalreel.nn.lora import LoRAConfig, adapter_state, adapters, add_lora, twin
from causalreel.parallel.fast import accelerate
from causalreel.parallel.offload import offload_activations
from causalreel.parallel.recompute import recompute_blocks
from causalreel.parallel.sharding import ParallelConfig, whole
from causalreel.train.stage import DataSource, Stage
from causalreel.train.stages.codec import CodecConfig, CodecStage
from causalreel.train.stages.dmd import DMD as DMDStage
from causalreel.train.trainer import TrainerConfig, train
from patience import PATIENCE_S
from test_resume import CLOCK
from test_stages import NULL, OPTIMISER, SELF_ROLLOUT, STAGES, VIEWER, make_dmd, net, source

HERE = Path(__file__).resolve()
SRC = HERE.parents[1] / "src"
CLOCKS = dict.fromkeys(CLOCK, 0)
DMD = dataclasses.replace(SELF_ROLLOUT, batch=4)


def clips(**how: Any) -> tuple[Stage, DataSource]:
    """The codec, on pictures of noise."""
    rows = torch.randint(256, (8, 9, 3, 16, 16), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    return CodecStage(tiny_codec(0), CodecConfig(batch=4, frames=5, sharpen_from=0, **how)), ClipSource(rows)


def adapted() -> tuple[Stage, DataSource]:
    """DMD whose three networks are one base with adapters of their own, or none."""
    teacher = net(trained=False)
    student, critic = twin(teacher), twin(teacher)
    for network, seed in ((student, 0), (critic, 1)):
        generator = torch.Generator().manual_seed(seed)
        add_lora(network.model, LoRAConfig(rank=4), generator)
        for _, layer in adapters(network.model):  # from 0 on, losses would be differences of nearly equal numbers
            torch.nn.init.normal_(layer.lora_B, std=2.0, generator=generator)
    return DMDStage(DMD, student=student, critic=critic, teacher=teacher, null=NULL, viewer=VIEWER), source()


def rolled_whole() -> tuple[Stage, DataSource]:
    """DMD whose rollouts go through the inference path, with weights that every process has whole."""
    stage, rows = make_dmd(DMD)
    assert isinstance(stage, DMDStage)
    stage.sampler = accelerate(copy.deepcopy(stage.student).requires_grad_(False))
    stage.whole = (stage.sampler,)
    return stage, rows


def changing(name: str) -> tuple[Stage, DataSource]:
    """A stage on clips whose text changes, each at a frame of its own."""
    stage, plain = CASES[name]()
    assert isinstance(plain, LatentSource)
    rows, frames = len(plain), plain.latents.shape[1]
    reads = torch.arange(rows)[:, None].expand(-1, frames).clone()
    for row in range(0, rows, 2):
        reads[row, 1 + row % (frames - 1) :] = (row + 1) % rows
    return stage, LatentSource(plain.latents, plain.conditioning, reads)


CASES: dict[str, Callable[[], tuple[Stage, DataSource]]] = {
    **{name: make for name, make in STAGES.items() if "DMD" not in name and "Caus" not in name and "score" not in name},
    "codec": clips,
    "codec, its decoder alone": lambda: clips(decoder_only=True, latent_error=0.5, patterns=0.5),
    "DMD": lambda: make_dmd(DMD),
    "DMD, replayed": lambda: make_dmd(dataclasses.replace(DMD, student_pass="replay", critic_rollouts=1)),
    "DMD with adapters": adapted,
    "DMD, rolled out whole": rolled_whole,
    "CausVid": lambda: make_dmd(dataclasses.replace(DMD, samples="data")),
    "causal score distillation": lambda: make_dmd(dataclasses.replace(DMD, samples="teacher_forced")),
    "teacher forcing, text by frame": lambda: changing("teacher forcing"),
    "DMD, text by frame": lambda: changing("DMD"),
    "DMD, prompts that change": lambda: make_dmd(dataclasses.replace(DMD, prompt_changes=0.5)),
}
STEPS = 3
STEADY = dataclasses.replace(OPTIMISER, eps=1e-3)
"""With the usual eps Adam divides rounding by rounding where a gradient is 0, and a gradient of another size gives the
same step: neither tells whether processes agree."""
FEW = ("teacher forcing", "DMD", "DMD, rolled out whole", "DMD with adapters")
"""What stands for the others where not all are run."""
KEPT = ("selective", "full", "on the host", "full, on the host")


def run(name: str, out: Path, kept: str = "plain", **changes: object) -> dict:
    """Three steps of a stage -> the records and all roles' weights, whole. kept: what becomes of activations."""
    torch.manual_seed(0)
    stage, rows = CASES[name]()
    trained = {role: STEADY for role in ("student", "critic", "codec") if role in stage.roles}
    for network in (stage.roles[role] for role in trained if kept != "plain"):
        recompute_blocks(network, "full" if "full" in kept else "selective" if "selective" in kept else "none")
        if "on the host" in kept:
            offload_activations(network)
    how = {"device": "cpu", "log_every": 1, "save_every": STEPS, "steps": STEPS, **changes}
    train(stage, rows, TrainerConfig(out=out, optimisers=trained, **how))
    states = {role: adapter_state(module) or module.state_dict() for role, module in stage.roles.items()}
    found = {f"{role}.{n}": whole(t).clone() for role, state in states.items() for n, t in state.items()}
    return {
        "weights": found,
        "records": [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()],
    }


def assert_close(one: dict, other: dict, name: str) -> None:
    """Losses and weights to 1e-6, relative."""
    for a, b in zip(one["records"], other["records"], strict=True):
        for key in a:
            if key.endswith("/loss"):
                assert a[key] == pytest.approx(b[key], rel=1e-6), (name, key, a["step"])
    for role in dict.fromkeys(key.split(".")[0] for key in one["weights"]):
        mine, theirs = (
            torch.cat([v.flatten().float() for k, v in run["weights"].items() if k.startswith(f"{role}.")])
            for run in (one, other)
        )
        assert (mine - theirs).norm() < 1e-6 * mine.norm(), (name, role)


# ---- accumulation


@pytest.mark.parametrize("name", CASES)
def test_two_parts_one_after_the_other_are_the_batch(name: str, alone: dict[str, dict], tmp_path: Path) -> None:
    assert_close(alone[name], run(name, tmp_path, accumulate=2), name)


def test_a_batch_that_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"batch: got 8, .*allowed are multiples of 3"):
        run("teacher forcing", tmp_path, accumulate=3)


@pytest.mark.parametrize(
    ("name", "kept"),
    [(name, kept) for name in CASES if "codec" not in name for kept in (KEPT if name in FEW else (KEPT[0], KEPT[-1]))],
)
def test_activations_that_are_not_kept_change_nothing(
    name: str, kept: str, alone: dict[str, dict], tmp_path: Path
) -> None:
    assert_close(alone[name], run(name, tmp_path, kept), name)


# ---- the host's memory

OFFLOADS = {"offload_averages": True, "offload_frozen": True}


def assert_same(one: dict, other: dict) -> None:
    """Weights and records to the bit."""
    assert one["weights"].keys() == other["weights"].keys()
    for key, value in one["weights"].items():
        assert torch.equal(value, other["weights"][key]), key
    assert [{**r, **CLOCKS} for r in one["records"]] == [{**r, **CLOCKS} for r in other["records"]]


@pytest.mark.parametrize("name", [name for name in CASES if "codec" not in name and name != "DMD with adapters"])
def test_networks_on_the_host_are_those_on_the_device(name: str, alone: dict[str, dict], tmp_path: Path) -> None:
    assert_same(alone[name], run(name, tmp_path, **OFFLOADS))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", ["DMD", "causal CD"])
def test_a_run_goes_on_with_or_without_networks_on_the_host(
    name: str, first: bool, alone: dict[str, dict], tmp_path: Path
) -> None:
    run(name, tmp_path, steps=2, save_every=1, **(OFFLOADS if first else {}))
    assert_same(alone[name], run(name, tmp_path, **({} if first else OFFLOADS)))


@pytest.mark.parametrize("key", OFFLOADS)
def test_adapters_have_their_base_on_the_device(key: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"trainer\.{key}: got true, but networks with adapters .*give false"):
        run("DMD with adapters", tmp_path, **{key: True})


# ---- processes

PARTS = {
    2: {"rows": ParallelConfig(), "groups": ParallelConfig(replicate=2), "tokens": ParallelConfig(context=2)},
    4: {"rows": ParallelConfig(), "groups": ParallelConfig(replicate=2), "tokens": ParallelConfig(context=2)},
}
"""Processes -> ways in which they share the work."""


def cases(count: int, how: str) -> list[str]:
    """What is run so: every stage a row or more a process, and of other ways a part by four (`test_ranks_whole`)."""
    if how == "groups" or (how == "tokens" and count > 2):
        return list(FEW)
    return [name for name in CASES if how == "rows" or not name.startswith("codec")]


def process(folder: str) -> None:
    """What each of the processes does."""
    from causalreel.parallel.mesh import join, launch

    where = launch()
    found: dict[tuple[str, str], Any] = {}
    assert where is not None
    with join(where, "cpu"):
        for how, parallel in PARTS[where.size].items():
            for name in cases(where.size, how):
                found[how, name] = run(name, Path(folder) / how / name, parallel=parallel)
        if where.size == 4:
            for name in FEW:
                run(name, Path(folder) / "begun" / name, steps=2)
        else:
            found |= resumed(Path(folder), where.rank)
    torch.save(found, f"{folder}/{where.rank}.pt")


def resumed(folder: Path, rank: int) -> dict[tuple[str, str], Any]:
    """Runs that were stopped, keep less or go on with what others began: asked of two processes, four take minutes."""
    found: dict[tuple[str, str], Any] = {}
    for name in FEW:
        for behind in (False, True):
            out = folder / f"stopped-{behind}" / name
            run(name, out, steps=2, save_every=1, saves_behind=behind)
            found[f"resumed, {behind}", name] = run(name, out, saves_behind=behind)
        if name != "DMD with adapters":
            found["hosted", name] = run(name, folder / "hosted" / name, **OFFLOADS)
        found["kept", name] = run(name, folder / "kept" / name, KEPT[-1])
    name = "causal CD"
    run(name, folder / "hosted" / name, steps=2, save_every=1, **OFFLOADS)
    found["hosted", name] = run(name, folder / "hosted" / name)
    found["full disk", "told"] = full_disk(folder / "disk", rank)
    for out in (folder / "given").glob("*/*"):
        found[f"from {out.parent.name}", out.name] = run(out.name, out)
    return found


def full_disk(out: Path, rank: int) -> str:
    """The second process's disk is full when it writes step 3 -> what all are told."""
    run("DMD", out, steps=2)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(FileSystemWriter, "write_data", fail)
        with pytest.raises(OSError) as caught:
            run("DMD", out)
    return str(caught.value)


def fail(*_: object) -> None:
    raise OSError(28, "No space left on device")


def torchrun(count: int, *command: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    return subprocess.Popen(
        [*launcher, *command],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=HERE.parent,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    return {name: run(name, tmp_path_factory.mktemp("alone")) for name in CASES}


def launched(folder: Path, count: int) -> list[dict]:
    """What each process found, by rank."""
    running = torchrun(count, str(HERE), str(folder))
    output, errors = running.communicate(timeout=2 * PATIENCE_S)  # some fifty runs
    assert running.returncode == 0, output + errors
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("four")
    return folder, launched(folder, 4)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, four: tuple[Path, list[dict]]) -> tuple[Path, list[dict]]:
    """Two processes, which also go on with what four and one have begun."""
    folder = tmp_path_factory.mktemp("two")
    for name in FEW:
        run(name, folder / "given" / "one" / name, steps=2)
        shutil.copytree(four[0] / "begun" / name, folder / "given" / "four" / name)
    return folder, launched(folder, 2)


@pytest.mark.parametrize("how", PARTS[2])
def test_two_processes_are_one(how: str, two: tuple[Path, list[dict]], alone: dict[str, dict]) -> None:
    for found in two[1]:
        for name in cases(2, how):
            assert_close(alone[name], found[how, name], f"{how}, {name}")


def test_two_processes_that_keep_no_activations_are_one(two: tuple[Path, list[dict]], alone: dict[str, dict]) -> None:
    for name in FEW:
        assert_close(alone[name], two[1][0]["kept", name], name)


@pytest.mark.parametrize("name", ["teacher forcing", "DMD", "causal CD"])
def test_what_two_processes_hold_on_the_host_is_what_they_hold(name: str, two: tuple[Path, list[dict]]) -> None:
    for found in two[1]:
        assert_same(found["rows", name], found["hosted", name])


def test_a_full_disk_of_one_process_leaves_the_former_checkpoint(two: tuple[Path, list[dict]]) -> None:
    there = two[0] / "disk" / "checkpoints"
    assert [path.name for path in there.iterdir()] == ["step-00000002"]
    for found in two[1]:
        told = found["full disk", "told"]
        assert f"{there / 'step-00000003'} could not be written (No space left on device); " in told, told
        assert told.endswith(f"{there / 'step-00000002'} is intact"), told


@pytest.mark.parametrize("how", PARTS[4])
def test_four_processes_are_one(how: str, four: tuple[Path, list[dict]], alone: dict[str, dict]) -> None:
    for name in cases(4, how):
        assert_close(alone[name], four[1][0][how, name], f"{how}, {name}")


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("name", FEW)
def test_resumed_is_uninterrupted_bit_for_bit(name: str, behind: bool, two: tuple[Path, list[dict]]) -> None:
    """Law 9, in as many processes; also where checkpoints are written while training goes on."""
    for found in two[1]:
        whole, parts = found["rows", name], found[f"resumed, {behind}", name]
        for key, value in whole["weights"].items():
            assert torch.equal(value, parts["weights"][key]), key
        assert [{**r, **CLOCKS} for r in whole["records"]] == [{**r, **CLOCKS} for r in parts["records"]]


@pytest.mark.parametrize("before", ["one", "four"])
def test_two_processes_go_on_with_what_others_began(
    before: str, two: tuple[Path, list[dict]], alone: dict[str, dict]
) -> None:
    for name in FEW:
        assert_close(alone[name], two[1][0][f"from {before}", name], f"from {before}, {name}")
        step = two[0] / "given" / before / name / "checkpoints" / f"step-{STEPS:08}"
        manifest = json.loads((step / "manifest.json").read_text())
        assert manifest["sha256"].keys() == manifest["bytes"].keys()  # files of ranks that there are no more, too


@pytest.mark.parametrize("name", FEW)
def test_one_process_goes_on_with_what_two_began(
    name: str, two: tuple[Path, list[dict]], alone: dict[str, dict], tmp_path: Path
) -> None:
    shutil.copytree(two[0] / "stopped-True" / name, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000003")
    assert_close(alone[name], run(name, tmp_path / "run"), name)


def test_frozen_roles_are_linked(two: tuple[Path, list[dict]]) -> None:
    places = sorted((two[0] / "stopped-False" / "DMD" / "checkpoints").iterdir())
    files = [sorted((place / "frozen").iterdir()) for place in places]
    assert len(files) == 2 and len(files[0]) > 1
    assert all(a.samefile(b) for a, b in zip(*files, strict=True))


def test_a_damaged_part_is_named(two: tuple[Path, list[dict]], tmp_path: Path) -> None:
    shutil.copytree(two[0] / "stopped-False" / "DMD", tmp_path / "run")
    part = sorted((tmp_path / "run" / "checkpoints" / "step-00000003").glob("__1_*.distcp"))[0]
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    with pytest.raises(
        ValueError, match=rf"{part.name} is damaged.*delete .*step-00000003 to go on from step-00000002"
    ):
        run("DMD", tmp_path / "run", steps=4)


if __name__ == "__main__":
    process(sys.argv[1])
