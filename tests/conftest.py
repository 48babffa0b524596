"""What every test relies on: one thread for the process and its children, Triton's interpreter where there is no GPU,
how long fuzz tests look (`pytest --fuzz 50`), and one line at the end that says which tests were skipped and why.

Networks as small as those of the tests are slower with more threads, many times so on a busy machine, and a test must
not depend on the number: `pytest --threads 2` runs everything with two, `--threads 0` with as many as torch takes.
"""

from __future__ import annotations

import collections
import logging
import os
import re

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
os.environ.update(dict.fromkeys(THREADS, "1"))  # libraries read them when they are imported

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile("fuzz", deadline=None, print_blob=True)

SKIPS = {
    "recorded numbers (CAUSALREEL_GOLDEN)": "CAUSALREEL_GOLDEN",
    "a GPU": "CUDA|GPU",
    "chromium": "chromium",
    "nginx": "nginx",
    "another processor": "processor",
    "patience (--whole)": "--whole",
    "an optional package": "extra |is not installed|could not import|needs playwright",
}
"""What is missing -> how the reasons of skipped tests speak of it."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", type=int, default=1, help="how many times as many random inputs fuzz tests try")
    parser.addoption("--whole", action="store_true", help="also what takes minutes: all stages by four processes")
    parser.addoption("--threads", type=int, default=1, help="threads of torch, here and in child processes; 0: its own")


def pytest_configure(config: pytest.Config) -> None:
    times, threads = config.getoption("--fuzz"), config.getoption("--threads")
    os.environ["CAUSALREEL_FUZZ"] = str(times)
    hypothesis.settings.load_profile("fixed" if times == 1 else "fuzz")
    torch.set_num_threads(threads or os.cpu_count() or 1)
    for name in THREADS:
        if threads:
            os.environ[name] = str(threads)
        else:
            del os.environ[name]
    if not threads:  # commands then say that they take one thread, before the one line that tests of errors expect
        logging.getLogger("causalreel").addFilter(lambda record: not record.msg.startswith("one CPU thread"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("whole") and not config.getoption("--whole"):
            item.add_marker(pytest.mark.skip(reason="needs --whole"))


def why_skipped(reasons: list[str]) -> str:
    """'skipped 3: 2 need a GPU, 1 nginx'; reasons of no known kind are said as they are."""
    kinds: collections.Counter[str] = collections.Counter()
    for reason in reasons:
        found = (kind for kind, pattern in SKIPS.items() if re.search(pattern, reason))
        kinds[next(found, reason.removeprefix("Skipped: ").removeprefix("needs "))] += 1
    (first, count), *others = kinds.most_common()
    return ", ".join([f"skipped {len(reasons)}: {count} need {first}", *(f"{n} {kind}" for kind, n in others)])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped:
        terminalreporter.write_line(why_skipped([str(report.longrepr[2]) for report in skipped]))
