"""A session in the scheduler's care, as its readers hold it: commands in, chunks kept for them, what wakes whom."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from causalreel.infer.commands import Close, Command
from causalreel.serve.emitted import Emitted, with_queue
from causalreel.serve.session import Session

Pace = Literal["realtime", "max"]


class Lost(LookupError):
    """The chunk that was asked for is no longer kept."""


@dataclass(frozen=True)
class Limits:
    """What sessions may take."""

    sessions: int = 8
    """At most so many at a time."""
    buffer_chunks: int = 2
    """Chunks made ahead of the reader, and ahead of playback at real time; a command waits behind them."""
    resume_chunks: int = 32
    """Chunks that the reader has taken and that are kept for it to come back to."""
    idle_s: float = 60.0
    """A session that nobody reads or commands for so long is closed; an ended one is forgotten."""
    memory_share: float = 0.9
    """Share of the memory free at the start that sessions may take together."""

    def __post_init__(self) -> None:
        for name in ("sessions", "buffer_chunks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.resume_chunks < 0 or not self.idle_s > 0 or not 0 < self.memory_share <= 1:
            raise ValueError(
                f"resume_chunks must be at least 0, idle_s positive and memory_share in (0, 1]; got "
                f"{self.resume_chunks}, {self.idle_s}, {self.memory_share}"
            )


@dataclass(frozen=True)
class Ended:
    """Why a session is over."""

    reason: str
    is_error: bool = False


class Handle:
    """A session in the scheduler's care, for any thread. `Scheduler.open` makes it."""

    def __init__(
        self, session: Session, pace: Pace, limits: Limits, clock: Callable[[], float], wake: Callable
    ) -> None:
        self.session, self.pace, self.limits = session, pace, limits
        self.ended: Ended | None = None
        self.due_s = clock()
        """When playback needs the next chunk: the virtual deadline."""
        self.ready_s = self.seen_s = clock()
        """Since when nothing but its pace kept it from being run; when somebody last read or commanded."""
        self.lead_s = 0.0
        """Playing time of the chunks that may be made ahead."""
        self.newest = self.taken = -1
        """Sequence numbers of the last chunk made, and of the last one that the reader has for certain."""
        self.decoding = threading.Lock()
        """Held while frames that a client sent are decoded: those of a session one message at a time."""
        self._clock, self._wake = clock, wake
        self._kept: deque[Emitted] = deque()
        self._condition = threading.Condition()
        self._listeners: list[Callable[[], None]] = []

    @property
    def id(self) -> str:
        return self.session.id

    def command(self, command: Command | str, **arguments: Any) -> int:
        """As `Session.command`; close takes effect at once."""
        self.seen_s = self._clock()
        number = self.session.command(command, **arguments)
        if isinstance(command, Close) or command == Close.name:
            self.close()
        if self.session.paused:
            self.ready_s = self.seen_s
        self._wake()
        return number

    def feed(self, pictures: Iterable[np.ndarray]) -> None:
        """As `Session.feed`."""
        now = self._clock()
        if not self.session.can_run:
            self.ready_s = now
        self.seen_s = now
        self.session.feed(pictures)
        self._wake()

    def pull(self, after: int, timeout: float) -> Emitted | Ended | None:
        """The chunk behind number `after` (-1: the first one), waited for; Ended once there is none; None in time.

        It also says that everything up to `after` has arrived, which makes room for more. Raises Lost if the chunk is
        no longer kept, ValueError if `after` has not been made yet.
        """
        with self._condition:
            if not -1 <= after <= self.newest:
                raise ValueError(f"after must be from -1 to {self.newest}, the last chunk made; got {after}")
            self.seen_s = self._clock()
            is_news = after > self.taken
            if is_news:
                if self.waiting >= self.limits.buffer_chunks:
                    self.ready_s = self.seen_s
                self.taken = after
                self._forget()
        if is_news:
            self._wake()
        with self._condition:
            self._condition.wait_for(lambda: self.ended is not None or self.newest > after, timeout)
            self.seen_s = self._clock()
            if self.newest <= after:
                return self.ended
            oldest = self.newest + 1 - len(self._kept)
            if after + 1 < oldest:
                raise Lost(f"chunk {after + 1} is no longer kept; the oldest kept is {oldest}")
            return self._kept[after + 1 - oldest]

    def listen(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` (from another thread, shortly) after each chunk, commands and the end; -> what stops it."""
        with self._condition:
            self._listeners.append(callback)

        def stop() -> None:
            with self._condition:
                if callback in self._listeners:
                    self._listeners.remove(callback)

        return stop

    def close(self, reason: str = "closed by client") -> None:
        """End the session now; the chunk in the making is thrown away. Chunks already made can still be pulled."""
        self.end(Ended(reason))
        self._wake()

    # ---- for the scheduler ----

    @property
    def waiting(self) -> int:
        """Chunks that the reader has not taken."""
        return self.newest - self.taken

    def may_run(self, now: float) -> bool:
        """Whether a chunk should be made."""
        if self.ended is not None or not self.session.can_run:
            return False
        if self.waiting >= self.limits.buffer_chunks:
            return False
        return self.pace == "max" or self.due_s - self.lead_s <= now

    def is_behind(self, now: float) -> bool:
        """Whether playback at real time has room for another chunk at once when the one in the making is there."""
        playing_s = self.lead_s / self.limits.buffer_chunks
        return max(self.due_s, now) + playing_s - self.lead_s <= now

    def add(self, emitted: Emitted, start: float, now: float) -> None:
        """Keep a new chunk, made between `start` and `now`, for the reader, and move the deadline on."""
        playing_s = len(emitted.frames) / self.session.fps
        could_s = self.ready_s if self.pace == "max" else max(self.ready_s, self.due_s - self.lead_s)
        self.lead_s = playing_s * self.limits.buffer_chunks
        self.due_s = playing_s + (now if self.pace == "max" else max(self.due_s, now))
        self.ready_s = now
        with self._condition:
            if self.ended is None:
                self._kept.append(with_queue(emitted, max(0.0, start - could_s)))
                self.newest = emitted.sequence
                self._forget()
                self._condition.notify_all()
        self.tell()

    def end(self, ended: Ended) -> None:
        """Nothing more will come; the first reason stays."""
        with self._condition:
            self.ended = self.ended or ended
            self._condition.notify_all()
        self.tell()

    def _forget(self) -> None:
        while self._kept and self._kept[0].sequence <= self.taken - self.limits.resume_chunks:
            self._kept.popleft()

    def tell(self) -> None:
        """Call those who listen."""
        for callback in list(self._listeners):
            callback()
