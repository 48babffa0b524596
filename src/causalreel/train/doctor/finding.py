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
