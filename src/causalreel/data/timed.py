"""Captions that change within a clip, in a line: `A<TAB>@6<TAB>B` is A, and B from latent frame 6 on."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

Timed = tuple[tuple[int, str], ...]
"""Captions, each with the latent frame from which it holds, the first at 0."""

_MARK = re.compile(r"@([1-9]\d{0,5})")


def joined(captions: Timed) -> str:
    """-> the line; a caption that never changes is a line as it is."""
    (_, first), *later = captions
    return "\t".join([first, *(part for frame, text in later for part in (f"@{frame}", text))])


def timed(line: str) -> Timed:
    """A line -> its captions; a line with tabs and without such marks is one caption."""
    first, *rest = line.split("\t")
    marks = [_MARK.fullmatch(mark.strip()) for mark in rest[::2]]
    frames = [int(mark[1]) for mark in marks if mark]
    if not rest or len(rest) % 2 or len(frames) < len(marks) or frames != sorted(set(frames)):
        return ((0, line),)
    return ((0, first), *zip(frames, rest[1::2], strict=True))


def readings(captions: Sequence[Timed], frames: int) -> tuple[list[str], Tensor]:
    """Captions of R clips of so many latent frames -> all texts one after the other, and each frame's (R,F) long.

    ValueError for a clip whose caption changes behind its last frame: marks count latent frames, not pictures.
    """
    texts: list[str] = []
    rows: list[list[int]] = []
    for number, clip in enumerate(captions):
        starts = [frame for frame, _ in clip]
        if starts[-1] >= frames:
            raise ValueError(
                f"clip {number}: its caption changes at latent frame {starts[-1]}, and it has {frames}, from 0 on"
            )
        rows.append([len(texts) + sum(start <= frame for start in starts) - 1 for frame in range(frames)])
        texts += [text for _, text in clip]
    return texts, torch.tensor(rows, dtype=torch.long)
