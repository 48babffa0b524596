"""Processes of one launch that end together: an error in one of them ends all, and the first process alone reports it.

Without this a launcher kills the others as soon as one process has failed, often before the first has said anything,
and a process whose partner has failed waits in a collective until it times out. The processes tell each other through
the launch's store, beside the process group, which may be what has failed.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from causalreel.parallel.mesh import Launch, another_store, store

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

ERROR, ENDED = "crew/error", "crew/ended"
POLL_S = 0.2
GRACE_S = 3.0
"""How long a process may take to notice another's error by itself (bad input fails everywhere at about the same time)
before it is ended from outside."""
LEAVE_S = 30.0
"""How long the others wait for the first process to finish what it says and writes."""
LAST_S = 1.0
"""How long after it the others leave when something failed, so that the launcher names the first process."""


@contextmanager
def crew(where: Launch, *, describe: Callable[[BaseException], str], report: Callable[[str], None]) -> Iterator[None]:
    """Run the body in every process; if it fails in one, all leave with status 2 and the first process reports.

    describe: an error in one line. report: called in the first process only, at most once. An error of the first
    process itself is raised as it was.
    """
    shared = store()
    over = threading.Lock()  # held by whoever ends this process: its own error, or the watch
    watch = threading.Thread(target=_watch, args=(where, another_store(), over, report), daemon=True)
    watch.start()
    try:
        yield
    except BaseException as error:
        _acquire(over)
        if not _is_success(error):
            shared.set(ERROR, f"{where.rank} {describe(error)}")
        if where.rank > 0:
            _wait(shared)
            time.sleep(LAST_S)
            _die(2)  # its partners are gone: nothing that waits for them may run
        raise
    _acquire(over)
    if where.rank > 0:
        _wait(shared)


def leave(where: Launch, status: int) -> int:
    """Called last in every process, when all is said: the first lets the others go; -> `status`.

    After an error the process ends here: what usually happens at exit might wait for processes that are gone.
    """
    if where.rank == 0:
        store().set(ENDED, "1")
        time.sleep(2 * POLL_S)  # the store may live in this process
    if status:
        if where.rank > 0:
            time.sleep(LAST_S)
        _die(status)
    return status


def _die(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _is_success(error: BaseException) -> bool:
    return isinstance(error, SystemExit) and not error.code


def _acquire(over: threading.Lock) -> None:
    """Take over the end of this process; if the watch has it, wait to be ended."""
    if not over.acquire(blocking=False):
        time.sleep(LEAVE_S)


def _wait(shared: Store) -> None:
    """Until the first process has ended."""
    until = time.monotonic() + LEAVE_S
    while time.monotonic() < until and not _has(shared, ENDED):
        time.sleep(POLL_S)


def _has(shared: Store, key: str) -> bool:
    """Whether the key is there; a store that has gone with its process counts as everything."""
    try:
        return shared.check([key])
    except RuntimeError:
        return True


def _watch(where: Launch, shared: Store, over: threading.Lock, report: Callable[[str], None]) -> None:
    """End this process if another has failed and this one, perhaps stuck in a collective, has not noticed."""
    while not _has(shared, ERROR):
        time.sleep(POLL_S)
        if over.locked():
            return
    time.sleep(GRACE_S)
    if not over.acquire(blocking=False):
        return
    if where.rank == 0:
        try:
            rank, _, message = shared.get(ERROR).decode().partition(" ")
            report(f"process {rank} of {where.size}: {message}")
            shared.set(ENDED, "1")
        except RuntimeError:
            report(f"a process of {where.size} has gone")
    else:
        _wait(shared)
        time.sleep(LAST_S)
    _die(2)
