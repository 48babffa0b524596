"""What a context policy answers, and in which words.

Caches, masks, schedules, estimates, training and live streams ask it; none of them knows which one it has. A policy
that decides by frames alone (`after`, `view`) works in every cache and in one-pass training. One that looks at what
frames hold (`selects`) is asked by caches of single tokens instead: see `nn.policies.selecting`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar, TypeVar


@dataclass(frozen=True)
class Frame:
    """What a policy knows of a frame; chunk = [chunk_start, chunk_end) in absolute latent frames."""

    index: int
    chunk_start: int
    chunk_end: int
    stream: int = 0
    """0: context for later frames; 1: the noisy half of teacher forcing, which nobody else sees."""
    cut: bool = False
    """Its chunk begins a new scene."""
    done: bool = False
    """It is finished, and read once more so that it can be committed."""


@dataclass(frozen=True)
class View:
    """What a chunk reads: context frames in order, the rotary position of each, and those of its own frames."""

    frames: tuple[Frame, ...]
    positions: tuple[int, ...]
    own: tuple[int, ...]


class ContextPolicy:
    """What stays of the past after a commit, what a chunk sees of it, and at which positions it is read.

    Subclasses are frozen dataclasses: their fields are the policy's numbers, as exports and `--policy` name them.
    """

    selects: ClassVar[bool] = False
    """It looks at keys or queries, so that what a chunk sees is not known before the rollout."""
    tells_done: ClassVar[bool] = False
    """Finished chunks that are read once more for the cache (`Frame.done`, at noise level 0) see something else."""

    @property
    def fuses(self) -> bool:
        """Whether a finished chunk may be read for the cache in the next one's first call (`rollout.fuse`)."""
        return not (self.selects or self.tells_done)

    @property
    def is_absolute(self) -> bool:
        """Every frame is read at its own index, in order: keys are stored rotated, and a mask says everything."""
        return False

    @property
    def is_endless(self) -> bool:
        """Positions never grow, however long the video."""
        return False

    def check(self, chunk: int) -> None:
        """ValueError if it cannot work with chunks of so many frames."""

    def after(self, held: tuple[Frame, ...], chunk: tuple[Frame, ...]) -> tuple[Frame, ...]:
        """Which of the frames held and of a chunk just committed stay."""
        raise NotImplementedError

    def view(self, held: tuple[Frame, ...], chunk: tuple[Frame, ...]) -> View:
        """What a chunk reads of the frames held."""
        raise NotImplementedError

    def most_seen(self, chunk: int) -> int | None:
        """Most frames that a chunk of so many frames sees, its own included; None: the more, the longer the video."""
        raise NotImplementedError

    def most_held(self, chunk: int) -> int | None:
        """Most frames that stay between chunks; None as there."""
        raise NotImplementedError

    def most_called(self, chunk: int) -> int:
        """Most frames of one call: two chunks, where a finished one is read for the cache in the next one's call."""
        return 2 * chunk if self.fuses else chunk

    def bounded(self, frames: int) -> ContextPolicy:
        """The same, made to see no more than so many frames if nothing else bounds it."""
        return self

    def span(self, frames: int | None, chunk: int = 1) -> int | None:
        """Most frames seen at once in a clip of `frames`; None if neither it nor what is seen ends."""
        return min((n for n in (self.most_seen(chunk), frames) if n is not None), default=None)


AnyFrame = TypeVar("AnyFrame", bound=Frame)


def chunks_of(frames: Sequence[Frame]) -> Iterator[tuple[Frame, ...]]:
    """Neighbouring frames of one chunk and stream, chunk by chunk."""
    for _, chunk in groupby(frames, lambda frame: (frame.chunk_start, frame.stream)):
        yield tuple(chunk)


def advance(policy: ContextPolicy, held: tuple[Frame, ...], frames: Sequence[Frame]) -> tuple[Frame, ...]:
    """What is held after these chunks have been committed one by one."""
    for chunk in chunks_of(frames):
        held = policy.after(held, chunk)
    return held


def first_and_newest(held: Sequence[Frame], first: int, total: int) -> tuple[Frame, ...]:
    """The first chunks of the video and the newest ones, `total` together, of frames held in order."""
    chunks = list(chunks_of(held))
    if len(chunks) > total:
        chunks = chunks[:first] + chunks[len(chunks) - (total - first) :]
    return tuple(frame for chunk in chunks for frame in chunk)


def right_before(start: int, frames: Sequence[Frame]) -> tuple[int, ...]:
    """Positions without gaps that end before `start`, at 0 where they would be below."""
    return tuple(max(0, start - len(frames) + i) for i in range(len(frames)))


def chunk_number(chunk: Sequence[Frame]) -> int:
    """Which chunk of the video this is, where all have its size but perhaps a shorter first one."""
    return -(-chunk[0].chunk_start // (chunk[0].chunk_end - chunk[0].chunk_start))
