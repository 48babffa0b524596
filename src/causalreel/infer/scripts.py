"""Prompts by time: "a red circle[5s] | a blue square[10s] | the same at night[5s#]", where # begins a new scene.

Seconds become latent frames, rounded to even, and these whole chunks, at least one for each prompt, as in Causal-rCM
(arXiv 2606.25473). Only a prompt that ends with a time in brackets is a script; the released code also takes a single
one, but leaves its brackets in the text and its time unused, here they count.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from causalreel.foreign import shown

NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)")
MOST_SECONDS, MOST_PROMPTS = 86_400.0, 1000
"""Of a script."""


@dataclass(frozen=True)
class Spoken:
    """One prompt of a script."""

    text: str
    seconds: float | None
    """How long it is shown; None, for the last one: until the end."""
    cut: bool = False
    """It begins a new scene."""


@dataclass(frozen=True)
class Spread:
    """A script over the frames of a clip."""

    prompts: tuple[int, ...]
    """Of each latent frame, the number of its prompt."""
    cuts: tuple[bool, ...]
    """Of each latent frame, whether its chunk begins a new scene."""


def is_script(prompt: str) -> bool:
    """Whether a prompt says times."""
    return any(_timed(part) is not None for part in prompt.split("|"))


def _timed(part: str) -> Spoken | None:
    """A prompt that ends with a time in brackets, whatever the time is; None for any other text."""
    text, bracket, rest = part.rstrip().rpartition("[")
    if not bracket or not rest.endswith("]"):
        return None
    time = rest[:-1].strip()
    cut = time.endswith("#")
    time = time.removesuffix("#").rstrip()
    number = time.removesuffix("s").rstrip()
    if number == time or NUMBER.fullmatch(number) is None:
        return None
    return Spoken(text.strip(), float(number), cut)


def read_script(prompt: str) -> tuple[Spoken, ...]:
    """The prompts of a script, in order; ValueError in one line."""
    parts = prompt.split("|")
    if len(parts) > MOST_PROMPTS:
        raise ValueError(f"a script has at most {MOST_PROMPTS} prompts, got {len(parts)}")
    found, total = [], 0.0
    for number, part in enumerate(parts, start=1):
        where, spoken = f"prompt {number} of the script", _timed(part)
        if not (part if spoken is None else spoken.text).strip():
            raise ValueError(f"{where} is empty: {shown(part.strip(), 40)!r}")
        if spoken is None or spoken.seconds is None:
            if number < len(parts):
                raise ValueError(
                    f"{where} has no time such as [5s]: {shown(part.strip(), 60)!r}; only the last may lack it"
                )
            found.append(Spoken(part.strip(), None))
            continue
        total += spoken.seconds
        if not 0 < spoken.seconds <= MOST_SECONDS:
            back = ": a script cannot go back in time" if spoken.seconds <= 0 else ""
            raise ValueError(
                f"{where} must be shown for more than 0 and up to {MOST_SECONDS:g} seconds, got "
                f"{spoken.seconds:g}{back}"
            )
        if total > MOST_SECONDS:
            raise ValueError(f"{where} ends after {total:g} seconds: a script lasts at most {MOST_SECONDS:g}")
        if spoken.cut and number == 1:
            raise ValueError("the first prompt of a script begins no new scene: leave out its #")
        found.append(spoken)
    return tuple(found)


def chunks_of(script: Sequence[Spoken], *, per_second: float, chunk: int, first: int | None = None) -> list[int | None]:
    """Chunks of each prompt; None for one that lasts until the end. per_second: latent frames; first: frames of the
    first chunk, if others than `chunk`."""
    first, counts = chunk if first is None else first, []
    for number, spoken in enumerate(script):
        if spoken.seconds is None:
            counts.append(None)
            continue
        frames = max(1, round(per_second * spoken.seconds))
        whole = -(-frames // chunk) if number else 1 + max(0, -(-(frames - first) // chunk))
        counts.append(max(1, whole))
    return counts


def spread(counts: Sequence[int | None], script: Sequence[Spoken], sizes: Sequence[int]) -> Spread:
    """The script over the chunks of a clip, of these sizes; the last prompt takes what is left, and ValueError if it
    does not come in."""
    prompts: list[int] = []
    cuts: list[bool] = []
    place = 0
    for number, (count, spoken) in enumerate(zip(counts, script, strict=True)):
        is_last = number == len(script) - 1
        mine = sizes[place:] if is_last or count is None else sizes[place : place + count]
        if not mine:
            raise ValueError(
                f"the clip ends before prompt {number + 1} of the script's {len(script)} begins: ask for more frames"
            )
        for i, size in enumerate(mine):
            prompts += [number] * size
            cuts += [spoken.cut and i == 0] * size
        place += len(mine)
    return Spread(tuple(prompts), tuple(cuts))
