"""Runs whose checkpoints are copied elsewhere: on a new machine they go on bit for bit, and what goes wrong on the way
is one line that leaves whole checkpoints on both sides.

The file systems are fsspec's memory, the local disk, and memory that fails in chosen ways.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations

from causalreel import cli, config
from causalreel.train import checkpoint, remote
from causalreel.train.elsewhere import check_url, masked
from causalreel.train.remote import attached
from causalreel.train.trainer import Result, TrainerConfig, train
from patience import PATIENCE_S, wait_until
from test_ranks import torchrun
from test_resume import assert_same, assert_same_run, stored
from test_trainer import OPTIMISERS, Rows, Toy, toy_config, weights

SECRET = "hunter2%2Fx"


class Faulty(MemoryFileSystem):
    """Memory whose writes do what a test asks for; `said` has the files that were put."""

    protocol = "faulty"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    said: ClassVar[list[str]] = []
    before_put: Callable[[str], None] = staticmethod(lambda path: None)
    before_pipe: Callable[[str], None] = staticmethod(lambda path: None)
    is_truncating = False
    can_copy = True

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + re.sub(r"^faulty://([^/]*@)?", "", path).strip("/")

    def put_file(self, lpath: str, rpath: str, **how: Any) -> None:
        type(self).before_put(rpath)
        self.said.append(rpath.rpartition("/run/")[2])
        data = Path(lpath).read_bytes()
        super().pipe_file(rpath, data[: len(data) // 2] if self.is_truncating else data)

    def pipe_file(self, path: str, value: bytes, **how: Any) -> None:
        type(self).before_pipe(path)
        super().pipe_file(path, value, **how)

    def cp_file(self, path1: str, path2: str, **how: Any) -> None:
        if not self.can_copy:
            raise NotImplementedError
        super().cp_file(path1, path2, **how)


fsspec.register_implementation("faulty", Faulty, clobber=True)


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing in memory, before and after; nothing fails."""
    monkeypatch.setattr(Faulty, "said", [])
    for kind in (MemoryFileSystem, Faulty):
        kind.store.clear()
        kind.pseudo_dirs[:] = [""]
    yield
    for kind in (MemoryFileSystem, Faulty):
        kind.store.clear()


def go(out: Path, url: str, steps: int = 12, stage: Toy | None = None, **changes: Any) -> Result:
    """A run with a remote, as `causalreel train` makes it, without an export."""
    settings = toy_config(out, steps, remote=url, **changes)
    with attached(settings, settings) as there:
        assert there is not None
        result = train(stage or Toy(), Rows(), settings, remote=there)
        there.finish()
    return result


def stopping(at: int) -> Toy:
    return Toy(lambda step: os.kill(os.getpid(), signal.SIGINT) if step == at - 1 else None)


def files(url: str) -> list[str]:
    fs, root = fsspec.core.url_to_fs(url)
    return sorted(name.removeprefix(root).strip("/") for name in fs.find(root))


def steps(url: str) -> list[int]:
    """Of the checkpoints that have a manifest there."""
    return [int(name[17:25]) for name in files(url) if name.endswith("/manifest.json")]


def lines(caplog: pytest.LogCaptureFixture, level: str = "WARNING") -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == level]


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "memory://bucket/run" if request.param == "memory" else f"file://{tmp_path}/shared/run/"


# ---- going on elsewhere


@pytest.mark.parametrize("stops", [(5,), (3, 9)])
def test_on_a_new_machine_a_run_goes_on_bit_for_bit(tmp_path: Path, url: str, stops: tuple[int, ...]) -> None:
    """Each part in a folder of its own, the metrics file included; and there is no trace of another remote."""
    whole = Toy()
    train(whole, Rows(), toy_config(tmp_path / "whole"))
    for stop in stops:
        assert go(tmp_path / str(stop), url, stage=stopping(stop)).is_interrupted
        assert steps(url)[-1] == stop
    last = Toy()
    assert go(tmp_path / "last", url, stage=last).step == 12
    assert_same(weights(whole), weights(last))
    assert_same_run(tmp_path / "whole", tmp_path / "last")
    assert {"config.yaml", "metrics.jsonl"} <= set(files(url)) and steps(url)[-1] == 12


PROGRAM = """
import sys, time
from pathlib import Path
from test_remote import *
stage = Toy(lambda step: (print(step, flush=True), time.sleep(0.02)))
raise SystemExit(go(Path(sys.argv[1]), sys.argv[2], 30, stage, save_every=2).exit_code)
"""


def test_killed_on_one_machine_it_goes_on_on_another(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/shared"
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "one"), url],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: process.poll() is not None or len(steps(url)) > 1, "two copies")
    process.kill()
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode == -signal.SIGKILL, "it was over before it could be killed"
    begun: list[int] = []
    go(tmp_path / "two", url, 30, Toy(begun.append), save_every=2)
    assert 0 < begun[0] < 30
    train(Toy(), Rows(), toy_config(tmp_path / "whole", 30, save_every=2))
    assert_same_run(tmp_path / "whole", tmp_path / "two")


def test_the_newer_one_counts_and_its_records_come_with_it(tmp_path: Path) -> None:
    url = "memory://bucket/run"
    go(tmp_path / "one", url, stage=stopping(4))
    go(tmp_path / "two", url, stage=stopping(8))
    begun: list[int] = []
    go(tmp_path / "one", url, stage=Toy(begun.append))  # which has step 4 and three records
    assert begun[0] == 8
    train(Toy(), Rows(), toy_config(tmp_path / "whole"))
    assert_same_run(tmp_path / "whole", tmp_path / "one")


def test_where_the_folder_has_the_newer_one_nothing_is_fetched(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And a run that has nothing to do copies what the remote lacks."""
    url = "memory://bucket/run"
    go(tmp_path / "one", url, stage=stopping(4))
    constant = toy_config(tmp_path / "one")
    train(Toy(), Rows(), constant)  # without the remote, which may come and go
    with caplog.at_level("INFO"):
        assert go(tmp_path / "one", url).is_idle
    assert "fetching" not in caplog.text and steps(url) == [4, 12]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda fs, path: fs.rm_file(f"{path}/manifest.json"), "it has no manifest"),
        (lambda fs, path: fs.rm_file(f"{path}/critic.safetensors"), "critic.safetensors has 0 bytes instead of"),
        (lambda fs, path: cut(fs, f"{path}/trainer.pt"), "trainer.pt has .* bytes instead of"),
        (lambda fs, path: flip(fs, f"{path}/student.safetensors"), "student.safetensors is not what was written"),
        (lambda fs, path: flip(fs, f"{path}/manifest.json"), "its manifest"),
    ],
)
def test_a_damaged_copy_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[..., None], told: str
) -> None:
    """In one line; the one before is taken, and the run leaves what an undisturbed one leaves, here and there."""
    url = "memory://bucket/run"
    go(tmp_path / "one", url, 6, save_every=3, optimisers=CONSTANT)
    damage(fsspec.filesystem("memory"), "/bucket/run/checkpoints/step-00000006")
    begun: list[int] = []
    go(tmp_path / "two", url, 6, Toy(begun.append), save_every=3, optimisers=CONSTANT)
    assert begun[0] == 3
    [line] = lines(caplog)
    assert re.search(f"{url}/checkpoints/step-00000006 is passed over: .*{told}", line)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert steps(url) == [3, 6]
    go(tmp_path / "three", url, 6, Toy(begun.append), optimisers=CONSTANT)
    assert len(begun) == 3 and len(lines(caplog)) == 1  # the copy is whole again, and nothing was left to do


CONSTANT = {role: replace(optimiser, schedule="constant") for role, optimiser in OPTIMISERS.items()}


def cut(fs: Any, path: str) -> None:
    fs.pipe_file(path, fs.cat_file(path)[:-1])


def flip(fs: Any, path: str) -> None:
    data = bytearray(fs.cat_file(path))
    data[len(data) // 2] ^= 1
    fs.pipe_file(path, bytes(data))


def test_a_remote_of_another_run_is_refused(tmp_path: Path) -> None:
    """Before the folder has anything of it, and also where the folder's own checkpoint is newer: it would go."""
    url = "memory://bucket/run"
    go(tmp_path / "one", url, 3)
    before = files(url)
    slower = {**OPTIMISERS, "critic": replace(OPTIMISERS["critic"], lr=0.5)}
    told = (
        r"^trainer.remote: checkpoint memory://.*step-00000003 is of another config: .*lr.*use another trainer.remote$"
    )
    with pytest.raises(ValueError, match=told):
        go(tmp_path / "two", url, 6, optimisers=slower)
    assert not (tmp_path / "two").exists()
    train(Toy(), Rows(), toy_config(tmp_path / "two", 6, optimisers=slower))
    with pytest.raises(ValueError, match=told):
        go(tmp_path / "two", url, 8, optimisers=slower)
    assert files(url) == before


@pytest.mark.parametrize(
    "change",
    [
        {"bytes": {"../../stolen": 2}},
        {"bytes": {"/stolen": 2}},
        {"bytes": {"a\\..\\stolen": 2}},
        {"bytes": {"manifest.json": 2}},
        {"bytes": {"": 2}},
        {"bytes": {"x" * 600: 2}},
        {"bytes": {"x": -1}},
        {"bytes": {"x": "2"}},
        {"bytes": []},
        {"roles": ["../../../x"]},
        {"roles": [3]},
        {"fixed": 3},
        {"contents": {"data": 3}},
        {"sha256": {"../x": "0"}},
        {"step": 7},
    ],
)
def test_a_strangers_manifest_leads_nowhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: dict[str, Any]
) -> None:
    url, fs = "memory://bucket/run", fsspec.filesystem("memory")
    fs.pipe_file("/bucket/stolen", b"no")
    path = "/bucket/run/checkpoints/step-00000003/manifest.json"
    facts = {"step": 3, "roles": ["student"], "fixed": {}, "contents": {}, "bytes": {}, "sha256": {}, **change}
    fs.pipe_file(path, json.dumps({**facts, "seal": checkpoint._seal(facts)}).encode())
    settings = toy_config(tmp_path / "out", 3, remote=url)
    with attached(settings, settings):
        pass
    [line] = lines(caplog)
    assert "step-00000003 is passed over: its manifest cannot be used: it" in line
    assert (
        len(line) < 400 and not list(tmp_path.rglob("stolen")) and not checkpoint.latest(tmp_path / "out/checkpoints")
    )


def test_a_manifest_without_end_is_not_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "JSON_BYTES", 1000)
    monkeypatch.setattr(remote, "RECORDS_BYTES", 10)
    url, fs = "memory://bucket/run", fsspec.filesystem("memory")
    fs.pipe_file("/bucket/run/checkpoints/step-00000009/manifest.json", b"[" * 1001)
    settings = toy_config(tmp_path / "out", 3, remote=url)
    with attached(settings, settings):
        pass
    assert "its manifest cannot be used: it has more than 1,000 bytes" in lines(caplog)[0]


def test_a_strangers_records_are_left_out(tmp_path: Path) -> None:
    url, fs = "memory://bucket/run", fsspec.filesystem("memory")
    go(tmp_path / "one", url, stage=stopping(6))
    records = fs.cat_file("/bucket/run/metrics.jsonl")
    fs.pipe_file("/bucket/run/metrics.jsonl", b"[" * 100_000 + b"\n\xff\xfe\n3\n" + records)
    go(tmp_path / "two", url)
    train(Toy(), Rows(), toy_config(tmp_path / "whole"))
    assert_same_run(tmp_path / "whole", tmp_path / "two")


# ---- copying


def test_as_many_are_kept_there_and_halves_go(tmp_path: Path) -> None:
    url, fs = "memory://bucket/run", fsspec.filesystem("memory")
    for number in range(1, 5):
        go(tmp_path / "one", url, number, keep=2, optimisers=CONSTANT)
        if number == 2:
            fs.pipe_file("/bucket/run/checkpoints/step-00000000/critic.safetensors", b"half")
            fs.pipe_file("/bucket/run/checkpoints/notes", b"somebody's")
    assert steps(url) == [3, 4]
    assert {name.split("/")[1] for name in files(url) if name.startswith("checkpoints/")} == {
        *("step-00000003", "step-00000004", "notes")
    }


def test_roles_that_never_change_are_copied_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the remote itself, if it can; by a run that goes on elsewhere too."""
    for can_copy, count in ((True, 1), (False, 3)):
        monkeypatch.setattr(Faulty, "can_copy", can_copy)
        Faulty.store.clear()
        Faulty.said.clear()
        for number in (1, 2, 3):
            go(tmp_path / f"{can_copy} {number}", "faulty://run", number, optimisers=CONSTANT)
        put = [name.rpartition("/")[2] for name in Faulty.said]
        assert put.count("teacher.safetensors") == count and put.count("student.safetensors") == 3
        there = Faulty.store["/run/checkpoints/step-00000003/teacher.safetensors"].getvalue()
        here = tmp_path / f"{can_copy} 3" / "checkpoints" / "step-00000003" / "teacher.safetensors"
        assert there == here.read_bytes()


def test_training_does_not_wait_for_a_slow_network(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is being copied stays here meanwhile, beside what is kept; the newest is copied next, and those between
    are not."""
    begun, go_on, seen = threading.Event(), threading.Event(), []
    monkeypatch.setattr(Faulty, "before_put", lambda path: (begun.set(), go_on.wait(PATIENCE_S)))
    monkeypatch.setattr(remote, "TELL_S", 0.1)

    def on_step(step: int) -> None:
        if step == 1:
            begun.wait(PATIENCE_S)
        if step == 8:
            seen.extend(path.name for path in checkpoint.complete(tmp_path / "checkpoints"))
            go_on.set()

    with caplog.at_level("INFO"):
        go(tmp_path, "faulty://run", 9, Toy(on_step), save_every=1, keep=1)
    assert seen == ["step-00000001", "step-00000008"]
    assert [path.name for path in checkpoint.complete(tmp_path / "checkpoints")] == ["step-00000009"]
    assert steps("faulty://run") == [9] and len([line for line in lines(caplog, "INFO") if "copied" in line]) < 5


def test_the_end_waits_and_says_how_far_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was held for it goes then."""

    def before_put(path: str) -> None:
        if "step-00000001/trainer.pt" in path:
            wait_until(lambda: "copying to" in caplog.text)

    monkeypatch.setattr(Faulty, "before_put", before_put)
    monkeypatch.setattr(remote, "TELL_S", 0.1)
    with caplog.at_level("INFO"):
        assert go(tmp_path, "faulty://run", stage=stopping(2), save_every=1, keep=1).is_interrupted
    said = lines(caplog, "INFO")
    copying = [n for n, line in enumerate(said) if line.startswith("copying to faulty://run: 0.0")]
    assert copying and copying[-1] < next(n for n, line in enumerate(said) if line.startswith("stopped after step 2"))
    assert steps("faulty://run") == [2]
    assert [path.name for path in checkpoint.complete(tmp_path / "checkpoints")] == ["step-00000002"]


def test_once_more_aborts_the_copy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is whole here, and does not count there."""
    go_on = threading.Event()

    def before_put(path: str) -> None:
        if "trainer.pt" in path:
            wait_until(lambda: "copying to" in caplog.text)
            os.kill(os.getpid(), signal.SIGINT)
            go_on.wait(PATIENCE_S)

    monkeypatch.setattr(Faulty, "before_put", before_put)
    monkeypatch.setattr(remote, "TELL_S", 0.1)
    try:
        with caplog.at_level("INFO"), pytest.raises(KeyboardInterrupt):
            go(tmp_path, "faulty://run", stage=stopping(2))
        assert stored(tmp_path).trainer["step"] == 2 and steps("faulty://run") == []
    finally:
        go_on.set()
        wait_until(lambda: not any(thread.name == "remote" for thread in threading.enumerate()))


@pytest.mark.parametrize("fault", ["the third file", "cut files", "a broken library"])
def test_a_copy_that_fails_is_a_line_and_the_next_is_tried(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def before_put(path: str) -> None:
        if "step-00000003" in path and fault == "the third file" and "critic" in path:
            raise PermissionError("Access\nDenied")
        if "step-00000003" in path and fault == "a broken library":
            raise KeyError("x")
        Faulty.is_truncating = fault == "cut files" and "step-00000003" in path and "student" in path

    monkeypatch.setattr(Faulty, "before_put", before_put)
    monkeypatch.setattr(Faulty, "is_truncating", False)
    url, done = "faulty://run", threading.Event()

    def on_step(step: int) -> None:  # what is copied is no longer waiting when the next one is saved
        if step in (3, 4, 5):
            wait_until(lambda: not any(t.name == "remote" for t in threading.enumerate()))
            done.set()

    go(tmp_path / "one", url, 6, Toy(on_step), save_every=3)
    [line] = lines(caplog)
    told = {
        "the third file": r"step-00000003/critic.safetensors could not be written \(PermissionError: Access Denied\)",
        "cut files": r"step-00000003/student.safetensors has \d+ bytes instead of \d+",
        "a broken library": r"step-00000003/average.safetensors could not be written \(KeyError: 'x'\)",
    }[fault]
    assert re.fullmatch(
        rf"step-00000003 was not copied to the remote \(faulty://run/checkpoints/{told}\); it is whole in "
        rf"{tmp_path}/one/checkpoints, and the next one is tried",
        line,
    )
    assert steps(url) == [6] and done.is_set()


def test_a_run_whose_last_copy_fails_ends_with_an_error_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything is here then; a half of it is there, which a new machine passes over."""
    url = "faulty://run"
    go(tmp_path / "one", url, stage=stopping(3))

    def refuse(path: str) -> None:
        if "step-00000012/teacher" in path:
            raise OSError("the network is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Faulty, "before_put", refuse)
        patch.setattr(Faulty, "can_copy", False)
        told = (
            rf"^trainer.remote: .*teacher.safetensors could not be written \(OSError: the network is gone\); {tmp_path}"
        )
        with pytest.raises(OSError, match=told):
            go(tmp_path / "one", url)
    assert stored(tmp_path / "one").trainer["step"] == 12 and steps(url) == [3]
    assert any("step-00000012" in name for name in files(url))
    begun: list[int] = []
    go(tmp_path / "two", url, 4, Toy(begun.append))
    assert begun == [3] and steps(url) == [3, 4]
    assert go(tmp_path / "one", url).is_idle and steps(url) == [4, 12]


# ---- settings and the command


@pytest.mark.parametrize(
    "url",
    ["bucket/run", "/mnt/run", "s3:/bucket/run", "s3:bucket", "simplecache::s3://b", "az://c/x?sig=x", "s3://", ""],
)
def test_what_is_no_url_is_refused_at_once(tmp_path: Path, url: str) -> None:
    with pytest.raises(ValueError, match=r"^remote: got .*the URL of a folder is expected, such as s3://bucket/folder"):
        toy_config(tmp_path, remote=url)


def test_passwords_are_masked() -> None:
    for url, shown in (
        ("sftp://me:hunter2@host/run", "sftp://me:***@host/run"),
        ("sftp://me:a@b:c/d@host/run", "sftp://me:***@host/run"),
        ("sftp://:x@host/run", "sftp://:***@host/run"),
        ("sftp://me@host:22/run", "sftp://me@host:22/run"),
        ("s3://bucket/run", "s3://bucket/run"),
        ("abfs://data@account.dfs.core.windows.net/run", "abfs://data@account.dfs.core.windows.net/run"),
    ):
        check_url(url)
        assert masked(url) == shown
    with pytest.raises(ValueError, match=r"me:\*\*\*@host"):
        check_url("sftp://me:hunter2@host/my run")


def test_the_remote_may_change_and_is_written_without_its_password(tmp_path: Path) -> None:
    settings = toy_config(tmp_path, remote=f"faulty://me:{SECRET}@run")
    assert "remote" not in config.fixed(settings)
    assert "hunter2" not in config.dump(settings) + repr(settings) and "faulty://me:***@run" in config.dump(settings)
    assert (
        config.loads("{out: x, steps: 1, optimisers: {a: {lr: 1}}, remote: 's3://b'}", TrainerConfig).remote == "s3://b"
    )
    with pytest.raises(ValueError, match="remote"):
        train(Toy(), Rows(), settings)  # without what copies


CODEC = ("train", "tiny/codec", "trainer.steps=2", "trainer.device=cpu", "trainer.preview_every=0", "settings.batch=2")
SMALL = ("rows=4", "settings.frames=5", "trainer.save_every=1", "trainer.log_every=1")


def test_the_command_copies_all_and_says_no_password(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = f"trainer.remote=faulty://me:{SECRET}@run"
    assert cli.main([*CODEC, *SMALL, where, f"trainer.out={tmp_path / 'one'}", "--dry-run"]) == 0
    assert not Faulty.store
    assert cli.main([*CODEC, *SMALL, where, f"trainer.out={tmp_path / 'one'}"]) == 0
    said = capsys.readouterr()
    assert "remote: faulty://me:***@run" in said.err and "# copies in faulty://me:***@run" in said.out
    export = {path.relative_to(tmp_path / "one").as_posix() for path in (tmp_path / "one" / "export").iterdir()}
    assert export and export <= set(files("faulty://run"))
    assert steps("faulty://run") == [1, 2]
    everything = said.out.encode() + said.err.encode()
    everything += b"".join(path.read_bytes() for path in (tmp_path / "one").rglob("*") if path.is_file())
    everything += b"".join(file.getvalue() for file in Faulty.store.values())
    assert b"hunter2" not in everything and everything.count(b"me:***@run") > 6
    assert cli.main([*CODEC, *SMALL, where, f"trainer.out={tmp_path / 'two'}"]) == 0  # nothing is left to train
    assert "nothing to do: 2 of 2 steps are done" in capsys.readouterr().err


def test_an_export_that_cannot_be_copied_is_one_error_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str) -> None:
        if "/export/" in path:
            raise OSError(f"cannot log in with {SECRET} or hunter2/x")

    monkeypatch.setattr(Faulty, "before_put", refuse)
    url = f"faulty://me:{SECRET}@run"
    fsspec.filesystem("faulty").pipe_file("/run/export/codec.yaml", b"of an earlier export, whose weights go")
    assert cli.main([*CODEC, *SMALL, f"trainer.remote={url}", f"trainer.out={tmp_path / 'one'}"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"causalreel: error: trainer.remote: faulty://me:\*\*\*@run/export/\S+ could not be written \(OSError: cannot "
        r"log in with \*\*\* or \*\*\*\); \S+/one has all of it: run the same command again to copy it",
        said[-1],
    )
    assert (tmp_path / "one" / "export" / "codec.yaml").is_file() and steps("faulty://run") == [1, 2]
    assert "export/codec.yaml" not in files("faulty://run")


def deny(path: str) -> None:
    raise PermissionError(f"Forbidden for {SECRET}")


@pytest.mark.parametrize(
    ("url", "status", "told"),
    [
        (
            "s4://bucket/run",
            2,
            r"s4://bucket/run could not be opened \(ValueError: Protocol not known: s4; did you mean s3",
        ),
        ("gone://b/run", 1, r"gone://b/run could not be opened \(Install gonefs to go; pip install gonefs\)"),
        (
            f"faulty://me:{SECRET}@x",
            2,
            r"faulty://me:\*\*\*@x/\S+ could not be written \(PermissionError: Forbidden for \*\*\*",
        ),
        ("file:///proc/none/run", 2, r"file:///proc/none/run could not be made \(FileNotFoundError: "),
        ("memory://", 2, r"got 'memory://', the URL of a folder is expected"),
        ("memory:///", 2, r"memory: names no folder"),
        ("sftp://me:***@host/run", 2, r"sftp://me:\*\*\*@host/run has a password that was masked when it was written"),
        ("bucket/run", 2, r"got 'bucket/run', the URL of a folder is expected"),
    ],
)
def test_a_wrong_url_is_one_line_before_the_training(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    url: str,
    status: int,
    told: str,
) -> None:
    gone = {"class": "gonefs.Gone", "err": "Install gonefs to go"}
    monkeypatch.setitem(known_implementations, "gone", gone)
    monkeypatch.setattr(Faulty, "before_pipe", deny)
    assert cli.main([*CODEC, *SMALL, f"trainer.remote={url}", f"trainer.out={tmp_path / 'one'}"]) == status
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and re.search(rf"remote: {told}", said[0]), said
    assert not (tmp_path / "one").exists()


# ---- several processes


@pytest.mark.slow
def test_one_process_two_and_one_go_on_from_each_others_copies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each in a new folder; the two write behind the training, and the copy is their checkpoint, file by file."""
    url = f"file://{tmp_path}/shared"
    how = (*CODEC, *SMALL, f"trainer.remote={url}", "trainer.saves_behind=true")
    how = (*how, "trainer.optimisers.codec.schedule=constant")
    assert cli.main([*how, f"trainer.out={tmp_path / 'one'}", "trainer.steps=1"]) == 0
    running = torchrun(2, "-m", "causalreel", *how, f"trainer.out={tmp_path / 'two'}")
    _, errors = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 0 and steps(url) == [1, 2], errors
    assert f"resumed {tmp_path}/two/checkpoints/step-00000001" in errors
    capsys.readouterr()
    assert cli.main([*how, f"trainer.out={tmp_path / 'three'}", "trainer.steps=3"]) == 0
    assert f"resumed {tmp_path}/three/checkpoints/step-00000002" in capsys.readouterr().err
    two, three = (tmp_path / out / "checkpoints" / "step-00000002" for out in ("two", "three"))
    names = sorted(path.relative_to(two) for path in two.rglob("*") if path.is_file())
    assert {".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json"} <= set(map(str, names))
    assert all((two / name).read_bytes() == (three / name).read_bytes() for name in names)
    records = (tmp_path / "three" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in records] == [1, 2, 3]
