"""`causalreel doctor`: ten broken runs are noticed and healthy ones are not, by real runs in miniature; and strange
folders are one line."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from causalreel import cli
from causalreel.data.video import write_video
from causalreel.train.doctor import curves, settings
from causalreel.train.doctor.files import RunFiles, read_run
from causalreel.train.doctor.report import Report, examine, told
from causalreel.train.recipe import resolve, shipped_recipes
from causalreel.weights.files import read_tensors, write_tensors
from ceilings import work_within

SCRIPT = Path(__file__).resolve().parents[1] / "runs" / "doctor.py"
KINDS = ("ar-frame", "ode-frame", "cd-frame", "dmd-frame")
STARTS = ("start-base", "start-ar-frame", "start-ode-frame")
BROKEN = {
    "wrong-shift": "shift",
    "missing-average": "average",
    "bfloat16-masters": "bfloat16 masters",
    "learning-rate-x30": "learning rate",
    "frozen-student": "frozen",
    "shuffled-captions": "text",
    "guidance-0-teacher": "guidance",
    "wrong-chunk": "chunk",
    "noisy-context-at-inference": "context noise",
    "no-first-chunk-steps": "first steps",
}


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("runs_doctor", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["runs_doctor"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Miniature runs: two seeds of four kinds, whose curves are in `curves.json`; another seed; ten broken ones."""
    folder, runs = tmp_path_factory.mktemp("doctor"), script()
    bench = runs.Bench(folder, is_smoke=True)
    bench.make_data()
    wanted = {f"{kind}-{seed}" for kind in KINDS for seed in (0, 1, 3)} | set(STARTS)
    for job in bench.jobs():
        if job.name in wanted or job.name.startswith("broken-"):
            runs.train_here(folder, job)
    made = {}
    for kind in KINDS:
        one = curves.make_curves(kind, [read_run(folder / f"{kind}-{seed}") for seed in (0, 1)])
        made[one.pop("name")] = one
    (folder / "curves.json").write_text(json.dumps({"curves": made}))
    return folder


def looked_at(out: Path, name: str) -> Report:
    return examine(out / name, curves.read_curves(out / "curves.json"))


@pytest.mark.parametrize("kind", KINDS)
def test_healthy_runs_of_another_seed_pass(out: Path, kind: str) -> None:
    report = looked_at(out, f"{kind}-3")
    assert report.is_healthy, told(report)
    assert report.curves == kind


@pytest.mark.parametrize(("name", "check"), BROKEN.items(), ids=list(BROKEN))
def test_broken_runs_are_noticed(out: Path, name: str, check: str) -> None:
    """For what they are, beside what else follows from it."""
    report = looked_at(out, f"broken-{name}")
    wrong = {finding.check for finding in report.findings if finding.level == "wrong"}
    assert check in wrong, told(report)


MEASURED = ("missing-average", "bfloat16-masters", "learning-rate-x30", "frozen-student", "shuffled-captions")


@pytest.mark.parametrize("name", MEASURED)
def test_some_faults_show_without_the_settings(out: Path, name: str, tmp_path: Path) -> None:
    """As where a fault is in the code or in the data and the recipe is in order."""
    found = looked_at(out, f"broken-{name}").findings
    assert any(finding.by == "measured" and finding.level == "wrong" for finding in found), found


def test_the_command_and_its_status(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = ["--curves", str(out / "curves.json")]
    assert cli.main(["doctor", str(out / "ar-frame-3"), *known]) == 0
    assert capsys.readouterr().out.endswith("nothing is wrong\n")
    assert cli.main(["doctor", str(out / "broken-frozen-student"), *known, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["stage"] == "dmd" and not report["is_healthy"] and report["step"] == report["steps"]
    assert any(f["check"] == "frozen" and f["by"] == "measured" and f["do"] for f in report["findings"])
    assert cli.main(["doctor", str(out)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"causalreel: error: {out} is no folder of a run: it has neither metrics.jsonl nor checkpoints"
    ]


@pytest.fixture
def copy(out: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(out / "dmd-frame-3", tmp_path / "run"))


def test_a_run_that_is_going_on(copy: Path) -> None:
    """No export, no checkpoint, a record that is torn, or none at all yet."""
    shutil.rmtree(copy / "export")
    shutil.rmtree(copy / "checkpoints")
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[:2]) + lines[2][:20])
    report = examine(copy, [])
    assert report.is_healthy and report.stage == "dmd" and 0 < report.step < (report.steps or 0)
    assert any("no checkpoint yet" in note for note in report.notes)
    (copy / "metrics.jsonl").write_text("")
    assert examine(copy, []).step == 0
    (copy / "config.yaml").unlink()
    assert examine(copy, []).stage is None


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if not name.endswith("codec")])
def test_no_shipped_recipe_is_accused(name: str) -> None:
    """Baselines and negative results are measured by themselves."""
    size = "wan-1.3b" if name.startswith("wan/") else "tiny"
    run = RunFiles(Path("nowhere"), [], resolve(name), size, [], None)
    assert [f for f in settings.found(run) if f.level == "wrong"] == []
    assert str(settings.nearest(resolve(name), size)).split("/")[0] == name.split("/")[0]


# ---- what checkpoints alone show


def rewrite(copy: Path, change: Callable[[dict[str, dict[str, torch.Tensor]]], None]) -> Report:
    """Change the weights of the last checkpoint, forget what records say of them."""
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    gone = ("update_ratio", "still", "coarse", "distance")
    kept = [{key: value for key, value in line.items() if not key.endswith(gone)} for line in lines]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    before, last = sorted((copy / "checkpoints").iterdir())
    roles = {path.stem: {k: v.clone() for k, v in read_tensors(path).items()} for path in last.glob("*.safetensors")}
    roles["before"] = read_tensors(before / "student.safetensors")
    change(roles)
    del roles["before"]
    for role, tensors in roles.items():
        (last / f"{role}.safetensors").unlink()
        write_tensors(last / f"{role}.safetensors", tensors)
    return examine(copy, [])


def checks(report: Report) -> set[str]:
    return {finding.check for finding in report.findings if finding.level == "wrong"}


def test_checkpoints_show_what_moves(copy: Path) -> None:
    assert rewrite(copy, lambda roles: None).is_healthy
    assert checks(rewrite(copy, lambda roles: roles.update(student=dict(roles["before"])))) == {"frozen"}


def test_checkpoints_show_bfloat16_copies_and_changed_teachers(copy: Path) -> None:
    def spoil(roles: dict[str, dict[str, torch.Tensor]]) -> None:
        roles["critic"] = {name: value.bfloat16().float() for name, value in roles["critic"].items()}
        roles["average"] = dict(roles["student"])
        roles["teacher"] = {name: value + 1 for name, value in roles["teacher"].items()}

    assert checks(rewrite(copy, spoil)) == {"bfloat16 masters", "average", "frozen role"}


# ---- records against each other


def with_records(copy: Path, steps: int = 40, **columns: Callable[[int], float]) -> Report:
    """The run with other records: name, with `_of_` for the slash, to value by record."""
    records = [
        {"step": 4 * (i + 1), "student/lr": 1e-4, "critic/lr": 1e-4, "data_wait": 0.0}
        | {name.replace("_of_", "/"): value(i) for name, value in columns.items()}
        for i in range(steps)
    ]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    shutil.rmtree(copy / "checkpoints", ignore_errors=True)
    return examine(copy, [])


def test_a_critic_that_falls_behind(copy: Path) -> None:
    assert with_records(copy, critic_of_loss=lambda i: 0.3 - 0.002 * i).is_healthy
    assert checks(with_records(copy, critic_of_loss=lambda i: 0.2 + 0.01 * i)) == {"critic"}
    moves = {"student_of_update_ratio": lambda i: 1e-3, "critic_of_update_ratio": lambda i: 2e-5}
    assert checks(with_records(copy, **moves)) == {"critic"}


def test_an_average_that_lags(copy: Path) -> None:
    """Its decay of 0.95 explains 20 steps of its student."""
    ratio = {"student_of_update_ratio": lambda i: 1e-3, "average_of_still": lambda i: 0.0}
    assert with_records(copy, average_of_distance=lambda i: 0.015, **ratio).is_healthy
    assert checks(with_records(copy, average_of_distance=lambda i: 0.5, **ratio)) == {"average"}
    assert checks(with_records(copy, average_of_distance=lambda i: 0.0, **ratio)) == {"average"}


def test_a_text_that_does_not_matter(copy: Path) -> None:
    for gain, seen in ((0.03, []), (-0.001, ["text"])):
        report = with_records(copy, probe_of_text=lambda i, gain=gain: gain)
        assert report.is_healthy and [f.check for f in report.findings if f.by == "measured"] == seen


def test_gradients_and_data(copy: Path) -> None:
    spiky = with_records(copy, student_of_grad_norm=lambda i: 50.0 if i == 30 else 1.0)
    assert spiky.is_healthy and [f.check for f in spiky.findings if f.by == "measured"] == ["gradient spike"]
    slow = with_records(copy, data_wait=lambda i: 0.5)
    assert slow.is_healthy and [f.check for f in slow.findings if f.by == "measured"] == ["data wait"]


@pytest.mark.parametrize(
    ("now", "check"),
    [
        ({"motion": 0.04}, "motion"),
        ({"motion": 0.9}, "motion"),
        ({"contrast": 0.4}, "saturation"),
        ({"colour": 0.5}, "saturation"),
        ({"contrast": 0.05}, "contrast"),
    ],
)
def test_previews_against_the_data(copy: Path, now: dict[str, float], check: str) -> None:
    data = {"motion": 0.2, "contrast": 0.2, "colour": 0.2}
    shown = {f"preview_of_{name}": lambda i, v=value: v for name, value in (data | now).items()}
    truth = {f"data_of_{name}": lambda i, v=value: v for name, value in data.items()}
    assert checks(with_records(copy, **{**shown, **truth})) == {check}
    healthy = {f"preview_of_{name}": lambda i, v=value: v for name, value in data.items()}
    assert with_records(copy, **{**healthy, **truth}).is_healthy


def test_previews_are_read_from_files_where_records_say_nothing(copy: Path) -> None:
    moving = torch.rand(9, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    (copy / "previews").mkdir(exist_ok=True)
    write_video(copy / "previews" / "step-00000000.mp4", moving)
    write_video(copy / "previews" / "step-00000008.mp4", moving[:1].expand(9, -1, -1, -1))
    report = with_records(copy)
    assert not any("previews" in note for note in report.notes)
    assert [finding.check for finding in report.findings if finding.by == "measured"] == ["motion"]
    for path in (copy / "previews").glob("*.mp4"):
        path.write_bytes(b"no video")
    assert any("previews" in note for note in with_records(copy).notes)


# ---- strange folders

SPOILED = [
    b"",
    b"\0" * 100,
    b"[" * 100_000,
    b'{"step": 1, "step": 2}\n',
    b'{"step": 1e400, "student/loss": 1}\n{"step": -1}\n{"step": true}\n{"step": "1"}\n',
    b'{"step": 3, "student/loss": ' + b"9" * 5000 + b"}\n",
    b'{"step": 2, "student/loss": "x", "student/lr": null, "a/lr": [1]}\n',
    b'{"step": 1, ' + b", ".join(b'"%d": 1' % i for i in range(2000)) + b"}\n",
    b'{"step": 5, "\\u202e\\n\\u001b[2J/lr": 1.0}\n',
    b"\xff\xfe{}\n" * 10,
]


@pytest.mark.parametrize("content", SPOILED, ids=range(len(SPOILED)))
def test_strange_records(tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    """A report, or one line; nothing of theirs moves the cursor."""
    (tmp_path / "metrics.jsonl").write_bytes(content)
    assert cli.main(["doctor", str(tmp_path)]) in (0, 2)
    said = capsys.readouterr()
    assert len(said.err.splitlines()) <= 1 and "\x1b" not in said.out + said.err and "\u202e" not in said.out


def test_strange_configs_are_notes(copy: Path) -> None:
    shutil.rmtree(copy / "checkpoints")
    for text in ("stage: never\n", "a: &a [*a]\n", "{" * 3000, "extends: ../../x.yaml\n", "\0"):
        (copy / "config.yaml").write_text(text)
        report = examine(copy, [])
        assert report.stage is None and any("settings are not known" in note for note in report.notes), text


def test_damaged_files_are_notes(copy: Path) -> None:
    chance = random.Random(0)
    for path in sorted(copy.rglob("*")):
        if path.is_file() and path.name not in ("metrics.jsonl", ".lock"):
            data = bytearray(path.read_bytes())
            for _ in range(20):
                data[chance.randrange(len(data))] = chance.randrange(256)
            path.unlink()
            path.write_bytes(data[: len(data) // 2])
    report = examine(copy, [])
    assert report.notes and report.step > 0


def test_large_files_take_bounded_memory(tmp_path: Path) -> None:
    line = json.dumps({"step": 1, "student/loss": 1.0}) + "\n"
    (tmp_path / "metrics.jsonl").write_text(line * 20_000 + "x" * 100_000_000)
    work_within(
        80,
        f"assert examine(Path({str(tmp_path)!r}), []).step == 1",
        setup="from pathlib import Path\nfrom causalreel.train.doctor.report import examine",
    )


def test_no_file_is_no_curves(tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "curves.json"
    for text in (
        "{}",
        '{"curves": {"a": 1}}',
        '{"curves": {"a": {"marks": {}, "batch": 1, "bands": {"student/loss": 1}}}}',
    ):
        bad.write_text(text)
        assert cli.main(["doctor", str(out / "ar-frame-3"), "--curves", str(bad)]) == 2
        assert "is no file of curves" in capsys.readouterr().err


def test_shipped_curves_are_read() -> None:
    for one in curves.read_curves():
        assert one.bands.keys() <= curves.METRICS.keys() and "student/loss" in one.bands
        for band in one.bands.values():
            assert all(low < high for low, high in zip(band.low, band.high, strict=True))


def test_shipped_curves_are_of_every_stage_and_their_runs_are_judged_by_them() -> None:
    known = curves.read_curves()
    stages = {str(one.marks["stage"]) for one in known}
    assert stages == {"pretrain", "ar_diffusion", "causal_ode", "causal_cd", "dmd"}
    for name, start in (("tiny/ar", "pretrain"), ("tiny/base", "random weights")):
        run = RunFiles(Path(), [], resolve(name), "tiny", [], None)
        notes: list[str] = []
        one = curves.of_run(run, known, notes)
        assert one is not None and one.begins == start and notes == []


def test_runs_that_begin_otherwise_are_not_compared() -> None:
    """A base that goes on from the shipped one has learned already what its curves still have to."""
    run = RunFiles(Path(), [], resolve("tiny/base", ["init.student=tiny/base"]), "tiny", [], None)
    notes: list[str] = []
    assert curves.of_run(run, curves.read_curves(), notes) is None
    assert notes == ["curves: runs of base begin with random weights, this one with pretrain"]
