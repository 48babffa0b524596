"""What a check finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be."""

    check: str
    """Which check: a short name, the same for the same fault."""
    level: Literal["wrong", "watch"]
    """wrong: the run will not become what it should; watch: it may."""
    by: Literal["settings", "measured"]
    """What it was seen in: the recipe, or what the run did."""
    what: str
    do: str
    """What helps."""


def wrong(check: str, what: str, do: str) -> Finding:
    """What was measured and will not come right."""
    return Finding(check, "wrong", "measured", what, do)


def watch(check: str, what: str, do: str) -> Finding:
    """What was measured and may come right."""
    return Finding(check, "watch", "measured", what, do)
