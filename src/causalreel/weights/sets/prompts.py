"""Prompts alone, one a line, for stages that need no clips. Empty lines and repeated prompts are left out, and said."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from causalreel.data.packing import Row
from causalreel.foreign import read_text
from causalreel.weights.sets import Found, Wanted

log = logging.getLogger(__name__)

WHAT = "a .txt of prompts, one a line"
BYTES = 1 << 30


def is_one(path: Path) -> bool:
    return path.is_file() and path.suffix == ".txt"


def rows(path: Path, wanted: Wanted) -> Iterator[Found]:
    if wanted.frames is not None:
        raise ValueError(f"{path}: prompts have no frames to be cut")
    lines = [line.rstrip() for line in read_text(path, most=BYTES, what="list of prompts").split("\n")]
    told = [line for line in lines if line]
    if not told:
        raise ValueError(f"{path} holds no prompts, one a line is expected")
    once = dict.fromkeys(told)
    if len(once) < len(told):
        log.warning("%s: %d of %d prompts are repeated and left out", path.name, len(told) - len(once), len(told))
    for number, prompt in enumerate(once):
        yield Found(f"{path.name}, prompt {number}", partial(Row, prompt, f"{path.name}, prompt {number}"))
