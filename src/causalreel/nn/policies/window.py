"""Everything, a window, a sink and a window, at absolute positions or at positions that never grow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from causalreel.nn.policies.interface import ContextPolicy, Frame, View


@dataclass(frozen=True)
class Context(ContextPolicy):
    """The latest frames and the first ones; sizes in latent frames. Its defaults are to see everything.

    With `last_position` keys are stored before their rotation, because where they are read changes.
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

    @property
    def is_absolute(self) -> bool:
        return self.last_position is None

    @property
    def is_endless(self) -> bool:
        return self.last_position is not None

    def check(self, chunk: int) -> None:
        if self.window is not None and self.sink + chunk > self.window:
            raise ValueError(
                f"window must hold the sink and the chunk's {chunk} frames: got window={self.window}, sink={self.sink}"
            )
        if self.last_position is not None and chunk > self.last_position + 1:
            raise ValueError(
                f"last_position must leave room for a chunk of {chunk} frames, got {self.last_position}; "
                f"allowed is {chunk - 1} and more"
            )

    def after(self, held: tuple[Frame, ...], chunk: tuple[Frame, ...]) -> tuple[Frame, ...]:
        everything = held + chunk
        return tuple(everything[i] for i in self.visible(everything, everything[-1].chunk_end))

    def view(self, held: tuple[Frame, ...], chunk: tuple[Frame, ...]) -> View:
        seen = tuple(held[i] for i in self.visible(held, chunk[0].chunk_end))
        if self.last_position is None:
            return View(seen, *(tuple(frame.index for frame in frames) for frames in (seen, chunk)))
        positions = self.positions(len(seen), chunk[0].chunk_end - chunk[0].chunk_start)
        return View(seen, positions[: len(seen)], positions[len(seen) :][: len(chunk)])

    def most_seen(self, chunk: int) -> int | None:
        return self.window

    def most_held(self, chunk: int) -> int | None:
        return self.window

    def bounded(self, frames: int) -> Context:
        return self if self.window is not None else replace(self, window=frames)

    def first_visible(self, chunk_end: int) -> int:
        """Oldest frame, beside the sink, that a chunk ending at `chunk_end` sees."""
        return 0 if self.window is None else max(0, chunk_end - (self.window - self.sink))

    def keeps(self, frame: int, chunk_end: int) -> bool:
        """Whether a chunk ending at `chunk_end` sees this earlier frame."""
        return frame < self.sink or frame >= self.first_visible(chunk_end)

    def visible(self, frames: Sequence[Frame], chunk_end: int) -> list[int]:
        """Which of these earlier frames a chunk ending at `chunk_end` sees: their places in the sequence."""
        return [place for place, frame in enumerate(frames) if self.keeps(frame.index, chunk_end)]

    def positions(self, seen: int, own: int) -> tuple[int, ...]:
        """Positions of `seen` context frames in order and of the chunk's `own` frames behind them, where re-indexed."""
        assert self.last_position is not None
        self.check(own)
        last = self.last_position + 1
        return tuple(max(0, position) for position in range(last - own - seen, last))
