"""A static cache for policies that read frames in any order: each frame has a place, and keeps it while it is held.

Nothing is copied: a call writes to free places, a commit makes them taken, an eviction free. Calls gather what they
read, and rotate it to where it is read: slower than `StaticCache` at absolute positions, in memory as flat.
"""

from __future__ import annotations

from causalreel.nn.masks import Frame, Reading, finished, reading
from causalreel.nn.policies.interface import ContextPolicy, advance
from causalreel.nn.static_cache import CacheMemory, Places, StaticCache

NOBODY = Frame(-1, -1, 0, stream=2)
"""What lies at a free place."""


class PagedCache(StaticCache):
    """As StaticCache, for a policy that decides by frames; chunks and prefix of the same size, as there."""

    def __init__(self, context: ContextPolicy, *, chunk: int, frames: int | None, memory: CacheMemory) -> None:
        super().__init__(context, chunk=chunk, frames=frames, memory=memory)
        self._taken: dict[int, int] = {}
        """Frame held -> its place."""
        self._own: dict[int, int] = {}

    @staticmethod
    def places(context: ContextPolicy, chunk: int, frames: int | None) -> int:
        """Latent frames that the memory must hold: those that stay, and a call's own."""
        held, called = context.most_held(chunk), context.most_called(chunk)
        assert held is not None
        return min(held + called, frames or held + called)

    @staticmethod
    def fits(context: ContextPolicy, chunk: int, frames: int | None, prefix: int = 0) -> bool:
        held = context.most_held(chunk)
        return held is not None and prefix <= held

    def begin(self, queries: tuple[Frame, ...], tokens: int) -> Reading:
        """As FrameCache.begin; sets `call` and `slots`."""
        if tokens != self.tokens:
            raise ValueError(f"the cache was made for {self.tokens} tokens a frame, the call has {tokens}")
        if queries[0].chunk_start != (self.frames[-1].chunk_end if self.frames else 0):
            raise ValueError(f"the call starts at frame {queries[0].chunk_start}, where the cache does not end")
        self.memory.admit(self)
        taken = set(self._taken.values())
        free = [place for place in range(self.memory.frames) if place not in taken]
        if len(queries) > len(free):
            raise ValueError(f"the cache has room for {len(free)} more frames, the call has {len(queries)}")
        self._queries, self._own = queries, {frame.index: free[i] for i, frame in enumerate(queries)}
        self._write_to([(place, place + 1) for place in self._own.values()])
        self.call = Places((0, self.memory.frames), len(queries))
        lying = [NOBODY] * self.memory.frames
        for frame in self.frames + queries:
            lying[self._own[frame.index] if frame.index in self._own else self._taken[frame.index]] = frame
        return reading(queries, tuple(lying), self.context, self.frames)

    def commit(self, frames: int) -> None:
        """As FrameCache.commit."""
        if not 0 < frames <= len(self._queries):
            raise ValueError(f"commit takes 1 to {len(self._queries)} frames of the latest call, got {frames}")
        self._require_memory()
        places = self._taken | self._own
        self.frames = advance(self.context, self.frames, finished(self._queries[:frames]))
        self._taken = {frame.index: places[frame.index] for frame in self.frames}
        self._queries, self._own, self.call = (), {}, None

    @property
    def _held(self) -> slice:
        return slice(0, self.memory.frames * self.tokens if self._taken else 0)
