"""Help for tests of what foreign bytes may cost: how many inputs a fuzz test draws, and work under a memory limit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from patience import PATIENCE_S

_FRAME = """
import resource, sys
MIB = 1 << 20
exec(compile(sys.argv[2], "setup", "exec"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with open("/proc/self/statm") as held:
    size = int(held.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[1]) * MIB,) * 2)
exec(compile(sys.argv[3], "work", "exec"))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(f"peak {(after - before) * 1024 // MIB}", file=sys.stderr)
"""


def examples(count: int) -> int:
    """How many inputs a fuzz test draws: `count` in a plain run, more with `pytest --fuzz N`."""
    return count * int(os.environ.get("CAUSALREEL_FUZZ", "1"))


@dataclass(frozen=True)
class Cost:
    """What a piece of work printed, and by how much it raised the process's peak memory."""

    output: str
    peak_mib: int


def work_within(mib: int, work: str, *arguments: str, setup: str = "", timeout_s: float = PATIENCE_S) -> Cost:
    """Run `work` in a process of its own that may take `mib` MiB of address space more than it has after `setup`.

    Both are Python source; `arguments` are in `arguments`. Fails with the process's traceback if it needs more.
    """
    names = f"arguments = {list(arguments)!r}\n"
    command: Sequence[str] = [sys.executable, "-c", _FRAME, str(mib), names + setup, work]
    quiet = {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, f"within {mib} MiB: {done.stderr[-2000:]}"
    return Cost(done.stdout, int(done.stderr.rsplit("peak ", 1)[1].split()[0]))
