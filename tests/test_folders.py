"""Folders that one process works in at a time: who is refused, what outlives a kill, and what is left behind."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import causalreel
from causalreel import folders
from causalreel.folders import claim

HOLDER = """
import os, sys
from causalreel.folders import claim
with claim(sys.argv[1], "a test"):
    if "fork" in sys.argv and os.fork() == 0:
        print("held", flush=True)
        sys.stdin.readline()  # a child that lives longer than its parent
        os._exit(0)
    if "fork" not in sys.argv:
        print("held", flush=True)
    import time
    time.sleep(600)
"""


def holder(folder: Path, *how: str) -> subprocess.Popen[str]:
    """A process that has claimed the folder."""
    environment = {**os.environ, "PYTHONPATH": str(Path(causalreel.__file__).parents[1])}
    pipes: dict = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder), *how], env=environment, **pipes)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("how", [(), ("fork",)], ids=["alone", "with a forked child"])
def test_a_claim_keeps_others_out_and_dies_with_its_process(tmp_path: Path, how: tuple[str, ...]) -> None:
    process = holder(tmp_path / "run", *how)
    try:
        refusal = rf"run is in use by process {process.pid} on .*\(a test\): wait"
        with pytest.raises(ValueError, match=refusal), claim(tmp_path / "run", "another"):
            pytest.fail("two processes in one folder")
        assert [path.name for path in (tmp_path / "run").iterdir()] == [folders.LOCK]
        process.send_signal(signal.SIGKILL)
        process.wait()
        with claim(tmp_path / "run", "another") as is_alone:
            assert is_alone
    finally:
        process.kill()
        process.communicate()
    assert list((tmp_path / "run").iterdir()) == []


def test_the_same_thread_may_claim_again_and_another_may_not(tmp_path: Path) -> None:
    errors: list[str] = []

    def other() -> None:
        try:
            with claim(tmp_path / "." / "run", "another thread"):
                errors.append("none")
        except ValueError as error:
            errors.append(str(error))

    with claim(tmp_path / "run", "outer"), claim(tmp_path / "run" / ".." / "run", "inner") as is_alone:
        assert is_alone
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(errors) == 1 and "is in use" in errors[0]


def test_a_forked_child_neither_holds_nor_releases_it(tmp_path: Path) -> None:
    with claim(tmp_path, "outer"):
        child = multiprocessing.get_context("fork").Process(target=lambda: None)
        child.start()
        child.join()
        pid = os.fork()
        if pid == 0:
            try:
                with claim(tmp_path, "child"):
                    os._exit(1)
            except ValueError:
                os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert (tmp_path / folders.LOCK).is_file()
    assert list(tmp_path.iterdir()) == []


def test_what_the_claim_made_and_nobody_filled_goes_with_it(tmp_path: Path) -> None:
    with claim(tmp_path / "a" / "b", "a test"):
        pass
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError), claim(tmp_path / "a" / "b", "a test"):
        (tmp_path / "a" / "kept").touch()
        raise RuntimeError
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_locks_it_goes_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(folders.fcntl, "flock", fail)
    with caplog.at_level(logging.WARNING), claim(tmp_path, "a test") as is_alone, claim(tmp_path, "again") as again:
        assert not is_alone and not again and list(tmp_path.iterdir()) == []
    assert len(caplog.records) == 1 and "without locks" in caplog.text


def test_many_at_once_never_overlap(tmp_path: Path) -> None:
    inside, most, done = [0], [0], [0]

    def work() -> None:
        for _ in range(200):
            try:
                with claim(tmp_path / "run", "a test"):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    inside[0] -= 1
                    done[0] += 1
            except ValueError:
                continue

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and done[0] > 0 and not list(tmp_path.glob("*/*"))
