"""The context of Rolling Forcing: the first chunk right before the newest finished ones, behind them a joint window.

Rolling Forcing (arXiv 2509.25161), as in the released code for long videos.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from causalreel.nn.policies.interface import ContextPolicy, Frame, View, right_before


@dataclass(frozen=True)
class RollingForcing(ContextPolicy):
    """Sizes in latent frames. A window of chunks at rising noise sees the sink, moved right before the newest finished
    frames that still have room, and these at their own positions.

    A finished chunk that is read again for the cache sees what is held at its own positions: the sink where it was, as
    long as `window` reaches back to it, and the chunk that it will drive out (nothing released has a `cache` so small
    that this one is in reach).
    """

    tells_done: ClassVar[bool] = True
    policy: Literal["rolling-forcing"] = "rolling-forcing"
    window: int = 21
    """Frames that a call sees, its own and the sink included."""
    sink: int = 3
    """First frames of the video, which stay for ever."""
    cache: int = 24
    """Frames that stay."""

    def __post_init__(self) -> None:
        if not 0 <= self.sink < min(self.window, self.cache):
            raise ValueError(
                f"window and cache must exceed sink, and that be at least 0; got window={self.window}, "
                f"cache={self.cache}, sink={self.sink}"
            )

    def check(self, chunk: int) -> None:
        if self.sink + chunk > self.window:
            raise ValueError(
                f"window must hold the sink and a call's {chunk} frames: got window={self.window}, sink={self.sink}"
            )

    def after(self, held: tuple[Frame, ...], chunk: tuple[Frame, ...]) -> tuple[Frame, ...]:
        everything = held + chunk
        gone = max(0, len(everything) - self.cache)
        return everything[: self.sink] + everything[self.sink + gone :] if gone else everything

    def view(self, held: tuple[Frame, ...], chunk: tuple[Frame, ...]) -> View:
        own, start = tuple(frame.index for frame in chunk), chunk[0].chunk_start
        if chunk[0].done:
            newest = held[max(0, len(held) - (self.window - len(chunk))) :]
            return View(newest, tuple(frame.index for frame in newest), own)
        sink, rest = held[: self.sink], held[self.sink :]
        room = self.window - (chunk[0].chunk_end - start) - self.sink
        working = rest[max(0, len(rest) - room) :]
        positions = right_before(start - len(working), sink) + tuple(frame.index for frame in working)
        return View(sink + working, positions, own)

    def most_seen(self, chunk: int) -> int | None:
        return self.window

    def most_held(self, chunk: int) -> int | None:
        return self.cache

    def most_called(self, chunk: int) -> int:
        return self.window - self.sink
