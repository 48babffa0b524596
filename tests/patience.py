"""Waiting in tests: for events and not for seconds, with an end that only a broken program meets."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")

PATIENCE_S = 300.0
"""Until a test gives up on what should happen, however busy the machine is. No test measures anything with it."""


def wait_until(holds: Callable[[], Found], what: object = "that", *, every_s: float = 0.01) -> Found:
    """What `holds` returns once it is true; AssertionError that names `what` when patience ends."""
    end = time.monotonic() + PATIENCE_S
    while not (found := holds()):
        assert time.monotonic() < end, f"waited {PATIENCE_S:g} s in vain for {what() if callable(what) else what}"
        time.sleep(every_s)
    return found
