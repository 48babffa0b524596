"""Whether a file is refused in the right words: one line that gives the recorded reason."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

IDLE_WORDS = {
    "a",
    "an",
    "and",
    "be",
    "cannot",
    "file",
    "in",
    "is",
    "its",
    "key",
    "no",
    "not",
    "of",
    "the",
    "to",
    "with",
}
"""Words of a reason that say nothing by themselves."""


def refusal(load: Callable[[], object], path: Path, expected: Mapping[str, Any]) -> str:
    """What is wrong with the way this file is refused; nothing if it is refused in one line that gives the reason."""
    message = message_of(load)
    if not message:
        return "it was loaded"
    if "\n" in message:
        return "more than one line"
    said = message.replace(str(path), "").lower()
    if (key := expected.get("key")) and str(key).lower() not in said:
        return f"{key} is not named"
    for what in ("found", "wanted"):
        if what in expected and ", ".join(map(str, expected[what])) not in said:
            return f"the shape {what} is not named"
    words = set(re.findall(r"[a-z]{2,}", str(expected["reason"]).lower())) - IDLE_WORDS
    heard = [word for word in words if word in said]
    return "" if 2 * len(heard) >= len(words) else f"no word of {expected['reason']!r}"


def message_of(load: Callable[[], object]) -> str:
    """What a ValueError says; nothing if there is none."""
    try:
        load()
    except ValueError as error:
        return str(error)
    return ""
