"""Files are whole or not there, whatever stops the writer."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from causalreel.files import append_text, remove_folder, remove_leftovers, replacing, replacing_folder, write_text
from causalreel.weights.files import read_tensors, write_tensors

SHORT_OF_ROOM = "import resource, signal\nresource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
"""As a full disk: the system refuses to make a file longer."""


def interrupted(target: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), replacing(target) as partial:
        partial.write_text("half")
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_a_file_is_what_it_was_until_the_new_one_is_whole(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "clip.mp4"
    interrupted(target, error)
    assert list(tmp_path.iterdir()) == []
    write_text(target, "old")
    interrupted(target, error)
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]
    with replacing(target) as partial:
        assert partial.parent == tmp_path and partial.suffix == ".mp4"
        partial.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new" and list(tmp_path.iterdir()) == [target]


def test_a_name_may_be_as_long_as_the_disk_allows_and_not_longer(tmp_path: Path) -> None:
    longest = tmp_path / ("ä" * 125 + ".json")
    write_text(longest, "{}")
    assert longest.read_text() == "{}"
    with pytest.raises(OSError, match="too long"), replacing(tmp_path / ("a" * 256)):
        raise AssertionError("the work began")
    assert list(tmp_path.iterdir()) == [longest]


def test_what_cannot_be_replaced_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("folder", "is a folder"), ("pipe", "no ordinary file"), ("absent/x", "there is no folder")):
        with pytest.raises(OSError, match=message) as caught, replacing(tmp_path / name):
            raise AssertionError("the work began")
        assert caught.value.filename == str(tmp_path / name)
    write_text(tmp_path / "folder" / "x", "")
    with pytest.raises(FileExistsError), replacing_folder(tmp_path / "folder"):
        raise AssertionError("the work began")


def test_an_error_names_the_target_and_not_the_temporary_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"t\.mp4") as caught, replacing(tmp_path / "t.mp4") as partial:
        raise OSError(errno.ENOSPC, "No space left on device", str(partial))
    assert "causalreel-" not in str(caught.value)


def test_a_file_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(1)})
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644


KILLED = """
import sys, os, signal
from causalreel.files import replacing, replacing_folder
with replacing_folder(sys.argv[1] + "/folder") as folder, replacing(sys.argv[1] + "/file.txt") as file:
    (folder / "part").write_text("half")
    file.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_next_writer_removes_what_a_killed_one_left_and_nothing_else(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 2
    (tmp_path / ".mine.partial").write_text("a user's")
    with replacing(tmp_path / "slow") as own, replacing(tmp_path / "other"):
        elsewhere = tmp_path / own.name.replace(own.name.split("-")[1], "0" * 8)
        elsewhere.write_text("what another machine is writing")
        assert own.exists() and remove_leftovers(tmp_path) == []
        os.utime(elsewhere, (0, 0))
        assert remove_leftovers(tmp_path) == [elsewhere]
    assert {path.name for path in tmp_path.iterdir()} == {".mine.partial", "slow", "other"}


def test_who_is_alone_in_a_folder_removes_all_but_its_own(tmp_path: Path) -> None:
    elsewhere = tmp_path / f".causalreel-{'0' * 8}-1-12345678.partial"
    elsewhere.mkdir()
    (elsewhere / "part").write_text("half")
    with replacing(tmp_path / "slow") as own:
        assert remove_leftovers(tmp_path) == []
        assert remove_leftovers(tmp_path, is_alone=True) == [elsewhere] and own.exists()


def test_a_folder_whose_deletion_is_killed_is_whole_or_a_leftover(tmp_path: Path) -> None:
    program = """
import os, shutil, signal, sys
from causalreel.files import remove_folder
shutil.rmtree = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
remove_folder(sys.argv[1])
"""
    for name in ("killed", "deleted"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_text("whole")
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "killed")], check=False)
    assert not (tmp_path / "killed").exists() and len(list(tmp_path.iterdir())) == 2
    remove_folder(tmp_path / "deleted")
    assert len(remove_leftovers(tmp_path)) == 1 and list(tmp_path.iterdir()) == []


def test_lines_that_do_not_fit_are_taken_back(tmp_path: Path) -> None:
    append_text(tmp_path / "lines", "one\n")
    program = """
import resource, signal, sys
from causalreel.files import append_text
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (6, 6))
append_text(sys.argv[1], "two and more\\n")
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "lines")], stderr=subprocess.PIPE, check=False)
    assert b"File too large" in done.stderr and (tmp_path / "lines").read_text() == "one\n"
    append_text(tmp_path / "lines", "three\n")
    assert (tmp_path / "lines").read_text() == "one\nthree\n"


@pytest.mark.parametrize(
    "work",
    [
        "write_tensors(target, {'a': torch.zeros(100_000)})",
        "save_export(target, denoiser, export)",
        "convert(source, target, 'wan', heads=2)",
        "convert(source, target + '.pt', 'official', heads=2)",
        "write_text(target, 'x' * 100_000)",
    ],
)
def test_a_full_disk_is_one_line_that_names_the_file_and_nothing_is_left(tmp_path: Path, work: str) -> None:
    setup = """
import sys, torch
from causalreel.files import write_text
from causalreel.infer.models import find
from causalreel.weights.convert import convert
from causalreel.weights.export import load_export, save_export
from causalreel.weights.files import write_tensors
source, target = str(find("tiny/frame-2step") / "model.safetensors"), sys.argv[1] + "/target"
denoiser, export = load_export(find("tiny/frame-2step"))
"""
    call = f"try:\n    {work}\nexcept OSError as error:\n    print(str(error).count(chr(10)), error.filename)\n"
    done = subprocess.run(
        [sys.executable, "-c", setup + SHORT_OF_ROOM + call, str(tmp_path)], check=False, capture_output=True, text=True
    )
    assert done.stdout.startswith(f"0 {tmp_path / 'target'}"), done.stderr[-600:]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_tensors_come_back(tmp_path: Path) -> None:
    write_tensors(tmp_path / "made" / "a.safetensors", {"a": torch.arange(3)})
    assert read_tensors(tmp_path / "made" / "a.safetensors")["a"].tolist() == [0, 1, 2]
