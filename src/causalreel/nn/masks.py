"""Who sees whom: one rule over per-frame facts, for every use of the network.

A frame knows its absolute index, the chunk it belongs to and its stream: 0 for frames that serve as context for later
ones, 1 for the noisy half of teacher forcing, which nobody else sees. Bidirectional, diffusion forcing, teacher
forcing, cached and fused inference are this rule with other facts.
Causal Forcing (arXiv 2602.02214), section 2 and figure 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor


@dataclass(frozen=True)
class Frame:
    """What the rule knows of a frame; chunk = [chunk_start, chunk_end) in absolute latent frames."""

    index: int
    chunk_start: int
    chunk_end: int
    stream: int = 0


@dataclass(frozen=True)
class Context:
    """The context policy: what stays of the past, what a chunk sees of it, and at which positions it is read.

    One object for caches, masks, schedules, estimates, training and live streams; all arithmetic of windows and sinks
    is here. With `last_position` keys are stored before their rotation, because where they are read changes.
    """

    window: int | None = None
    """Latent frames a chunk sees, its own and the sink included; None: all."""
    sink: int = 0
    """First frames of the video that stay visible for ever."""
    last_position: int | None = None
    """Rotary position of every chunk's last frame, its context right before it without gaps, and at 0 where that would
    be below; positions then never grow. None: every frame is at its absolute index."""

    def __post_init__(self) -> None:
        if self.sink < 0 or (self.window is not None and self.window <= self.sink):
            raise ValueError(
                f"window must exceed sink, and sink be at least 0; got window={self.window}, sink={self.sink}"
            )
        if self.last_position is not None and self.last_position < 0:
            raise ValueError(f"last_position must be at least 0, got {self.last_position}")

    def first_visible(self, chunk_end: int) -> int:
        """Oldest frame, beside the sink, that a chunk ending at `chunk_end` sees."""
        return 0 if self.window is None else max(0, chunk_end - (self.window - self.sink))

    def keeps(self, frame: int, chunk_end: int) -> bool:
        """Whether a chunk ending at `chunk_end` sees this earlier frame."""
        return frame < self.sink or frame >= self.first_visible(chunk_end)

    def visible(self, frames: Sequence[Frame], chunk_end: int) -> list[int]:
        """Which of these earlier frames a chunk ending at `chunk_end` sees: their places in the sequence."""
        return [place for place, frame in enumerate(frames) if self.keeps(frame.index, chunk_end)]

    def span(self, frames: int | None) -> int | None:
        """Most frames seen at once in a clip of `frames` latent frames; None if neither it nor the window ends."""
        return min((n for n in (self.window, frames) if n is not None), default=None)

    def bounded(self, frames: int) -> Context:
        """The same with a window of so many frames, if it has none."""
        return self if self.window is not None else replace(self, window=frames)

    def positions(self, seen: int, own: int) -> tuple[int, ...]:
        """Positions of `seen` context frames in order and of the chunk's `own` frames behind them, where re-indexed."""
        assert self.last_position is not None
        if own > self.last_position + 1:
            raise ValueError(
                f"last_position must leave room for a chunk of {own} frames, got {self.last_position}; "
                f"allowed is {own - 1} and more"
            )
        last = self.last_position + 1
        return tuple(max(0, position) for position in range(last - own - seen, last))


@dataclass(frozen=True)
class FrameMask:
    """allowed[q][k]: query frame q sees key frame k. Hashable, so that token masks are cached by value."""

    allowed: tuple[tuple[bool, ...], ...]

    @property
    def is_full(self) -> bool:
        return all(all(row) for row in self.allowed)

    def dense(self, tokens: int, device: torch.device) -> Tensor:
        """-> (Fq*tokens, Fk*tokens) bool: the mask for scaled_dot_product_attention."""
        return _dense(self, tokens, device)


def frames_of(sizes: Sequence[int], *, start: int = 0, stream: int = 0) -> tuple[Frame, ...]:
    """The facts of neighbouring chunks of these sizes, the first at absolute frame `start`."""
    found: list[Frame] = []
    for size in sizes:
        found += [Frame(i, start, start + size, stream) for i in range(start, start + size)]
        start += size
    return tuple(found)


def sees(query: Frame, key: Frame, context: Context) -> bool:
    """The rule: one's own chunk in one's own stream, and earlier context inside the window or the sink."""
    if query.stream == key.stream and query.chunk_start == key.chunk_start:
        return True
    is_past_context = key.stream == 0 and key.chunk_end <= query.chunk_start
    return is_past_context and context.keeps(key.index, query.chunk_end)


@lru_cache(maxsize=4096)
def frame_mask(queries: tuple[Frame, ...], keys: tuple[Frame, ...], context: Context) -> FrameMask | None:
    """The mask of a call; None where every query sees every key. ValueError where a chunk does not fit the window."""
    for frame in queries:
        if context.window is not None and context.sink + frame.chunk_end - frame.chunk_start > context.window:
            raise ValueError(
                f"window must hold the sink and one chunk: window={context.window}, sink={context.sink}, "
                f"chunk={frame.chunk_end - frame.chunk_start}"
            )
    mask = FrameMask(tuple(tuple(sees(q, k, context) for k in keys) for q in queries))
    return None if mask.is_full else mask


@dataclass(frozen=True)
class Group:
    """A chunk of queries and the keys it reads, each rotated to the position it has for this chunk."""

    rows: tuple[int, int]
    """Query frames [a, b)."""
    keys: tuple[int, ...]
    """Key frames, by their place among all keys of the call."""
    positions: tuple[int, ...]
    """Theirs."""


@dataclass(frozen=True)
class Reading:
    """What the frames of a call read of [visible context, own frames]. Hashable, so that recordings are found by it."""

    positions: tuple[int, ...]
    """Rotary position of each query frame; of its key too, where keys are stored rotated."""
    mask: FrameMask | None = None
    """None where every query sees every key."""
    groups: tuple[Group, ...] = ()
    """Where keys are stored before their rotation: chunk by chunk what is read, instead of the mask."""


@lru_cache(maxsize=4096)
def reading(queries: tuple[Frame, ...], keys: tuple[Frame, ...], context: Context) -> Reading:
    """What a call over `queries` reads of `keys`, in whatever order these lie. ValueError as of `frame_mask`."""
    mask = frame_mask(queries, keys, context)
    if context.last_position is None:
        return Reading(tuple(frame.index for frame in queries), mask)
    groups, positions, top = [], [], 0
    for (start, end, _), chunk in groupby(queries, lambda frame: (frame.chunk_start, frame.chunk_end, frame.stream)):
        rows = list(chunk)
        seen = [place for place, key in enumerate(keys) if sees(rows[0], key, context)]
        seen.sort(key=lambda place: keys[place].index)
        here = context.positions(len(seen) - (end - start), end - start)
        groups.append(Group((top, top + len(rows)), tuple(seen), here))
        positions += here[-len(rows) :]
        top += len(rows)
    return Reading(tuple(positions), None, tuple(groups))


def finished(frames: tuple[Frame, ...]) -> tuple[Frame, ...]:
    """Frames that a call commits, as later chunks know them: a chunk that is cut ends where it is cut."""
    end = frames[-1].index + 1
    return tuple(replace(frame, chunk_end=min(frame.chunk_end, end)) for frame in frames)


@lru_cache(maxsize=64)
def _dense(mask: FrameMask, tokens: int, device: torch.device) -> Tensor:
    allowed = torch.tensor(mask.allowed, dtype=torch.bool)  # (Fq,Fk)
    return allowed.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1).to(device)
