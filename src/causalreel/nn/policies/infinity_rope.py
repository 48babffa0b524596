"""Infinity-RoPE: positions relative to the chunk, so that a video never reaches untrained ones; flushes and scene cuts.

Causal-rCM (arXiv 2606.25473), its extrapolation script; the rules, not the code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from causalreel.nn.policies.interface import (
    ContextPolicy,
    Frame,
    View,
    chunk_number,
    chunks_of,
    first_and_newest,
    right_before,
)


@dataclass(frozen=True)
class InfinityRope(ContextPolicy):
    """The first and the newest chunks, read without gaps right before the chunk, which always ends at `last_position`.

    A scene cut moves the chunk away from its context by `cut_shift` positions and then forgets the old scene.
    """

    policy: Literal["infinity-rope"] = "infinity-rope"
    cache_chunks: int = 6
    """Chunks that stay, the sink included."""
    sink_chunks: int = 1
    """First chunks of the video, which stay for ever."""
    last_position: int = 20
    """Position of every chunk's last frame; context that would lie below 0 is read at 0."""
    flush_every: int = 0
    """After every so many chunks only the sink and the newest chunk stay; 0: never."""
    cut_shift: int = 21
    """Positions by which a chunk that begins a scene is moved on."""
    shifts_single_frames: bool = True
    """Whether chunks of one frame are moved too."""

    def __post_init__(self) -> None:
        if not 0 <= self.sink_chunks < self.cache_chunks:
            raise ValueError(
                f"cache_chunks must exceed sink_chunks, and that be at least 0; got {self.cache_chunks} and "
                f"{self.sink_chunks}"
            )
        for name in ("last_position", "flush_every", "cut_shift"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")

    @property
    def is_endless(self) -> bool:
        return True

    def check(self, chunk: int) -> None:
        if chunk > self.last_position + 1:
            raise ValueError(
                f"last_position must leave room for a chunk of {chunk} frames, got {self.last_position}; "
                f"allowed is {chunk - 1} and more"
            )

    def after(self, held: tuple[Frame, ...], chunk: tuple[Frame, ...]) -> tuple[Frame, ...]:
        chunks = list(chunks_of(held + chunk))
        is_due = self.flush_every > 0 and (chunk_number(chunk) + 1) % self.flush_every == 0
        if (chunk[0].cut or is_due) and len(chunks) > self.sink_chunks + 1:
            return first_and_newest(held + chunk, self.sink_chunks, self.sink_chunks + 1)
        return first_and_newest(held + chunk, self.sink_chunks, self.cache_chunks)

    def view(self, held: tuple[Frame, ...], chunk: tuple[Frame, ...]) -> View:
        size = chunk[0].chunk_end - chunk[0].chunk_start
        self.check(size)
        first = self.last_position + 1 - size
        is_moved = chunk[0].cut and (size > 1 or self.shifts_single_frames)
        own = first + (self.cut_shift if is_moved else 0)
        return View(held, right_before(first, held), tuple(range(own, own + len(chunk))))

    def most_seen(self, chunk: int) -> int | None:
        return (self.cache_chunks + 1) * chunk

    def most_held(self, chunk: int) -> int | None:
        return self.cache_chunks * chunk
