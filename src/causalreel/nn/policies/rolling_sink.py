"""Rolling sink: the beginning of the video, replayed forwards and backwards as the recent past.

Causal-rCM (arXiv 2606.25473), its extrapolation script; the rules, not the code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from causalreel.nn.policies.interface import ContextPolicy, Frame, View, chunk_number, chunks_of, right_before


@dataclass(frozen=True)
class RollingSink(ContextPolicy):
    """The first `sink_chunks + recent_chunks` chunks are a bank that stays; chunk after chunk, `sink_chunks` of it are
    read, one further each time and backwards in every second round, and behind them the newest `recent_chunks`.

    They are read right before the chunk, without gaps; the chunk itself is at its absolute position.
    """

    policy: Literal["rolling-sink"] = "rolling-sink"
    sink_chunks: int = 5
    """Chunks of the bank that are read at once."""
    recent_chunks: int = 1
    """Newest chunks that are read."""

    def __post_init__(self) -> None:
        if self.sink_chunks < 1 or self.recent_chunks < 1:
            raise ValueError(
                f"sink_chunks and recent_chunks must be at least 1, got {self.sink_chunks} and {self.recent_chunks}"
            )

    @property
    def bank(self) -> int:
        """Chunks of the bank. The released code lets it be larger, and then overwrites it by what it replays."""
        return self.sink_chunks + self.recent_chunks

    def after(self, held: tuple[Frame, ...], chunk: tuple[Frame, ...]) -> tuple[Frame, ...]:
        chunks = list(chunks_of(held + chunk))
        stay = chunks[: self.bank] + chunks[self.bank :][-self.recent_chunks :]
        return tuple(frame for chunk in stay for frame in chunk)

    def view(self, held: tuple[Frame, ...], chunk: tuple[Frame, ...]) -> View:
        chunks = list(chunks_of(held))
        if len(chunks) > self.bank:
            phase = (chunk_number(chunk) - self.bank) % (2 * self.bank)
            turn = phase % self.bank
            order = [(turn + j) % self.bank for j in range(self.sink_chunks)]
            if phase >= self.bank:  # backwards, frames too
                order = [(self.bank - 1 - turn - j) % self.bank for j in range(self.sink_chunks)]
            step = 1 if phase < self.bank else -1
            chunks = [chunks[i][::step] for i in order] + chunks[-self.recent_chunks :]
        seen = tuple(frame for chunk in chunks for frame in chunk)
        return View(seen, right_before(chunk[0].chunk_start, seen), tuple(frame.index for frame in chunk))

    def most_seen(self, chunk: int) -> int | None:
        return (self.bank + 1) * chunk

    def most_held(self, chunk: int) -> int | None:
        return (self.bank + self.recent_chunks) * chunk
