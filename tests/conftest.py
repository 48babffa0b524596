"""Before anything imports Triton: on a machine without a GPU its kernels run in the interpreter. And how long fuzz
tests look: `pytest --fuzz 50` draws fifty times as many inputs, new ones in every run."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile("fuzz", deadline=None, print_blob=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", type=int, default=1, help="how many times as many random inputs fuzz tests try")


def pytest_configure(config: pytest.Config) -> None:
    times = config.getoption("--fuzz")
    os.environ["CAUSALREEL_FUZZ"] = str(times)
    hypothesis.settings.load_profile("fixed" if times == 1 else "fuzz")
