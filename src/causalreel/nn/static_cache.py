"""A KV cache in memory that never moves: one buffer for all layers, so that calls can be recorded and replayed.

The same frames are visible as with `KVCache`; only where they lie differs. Attention does not care about the order of
keys, so a full window is a ring: finished frames stay where they are and the oldest ones are overwritten. Layout, in
latent frames, for chunks of c:

    [ leaving c | sink and ring W - c | own c ]

While the video is shorter than the window, frame f lies at c + f (at f if the video ends there). From then on a call's
own keys lie at the end, and a fused call first moves the oldest chunk of the ring to the front, where its first half
still sees it. Only chunks that divide the ring fit (else use `KVCache`). A call writes to places that no committed
frame holds.

Calls are recorded over a memory, so all live rollouts of one size use the same one, in turn: when another one's call
begins, what lies there is copied away, and copied back when its turn comes.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from causalreel.nn.masks import Context, Frame, Reading, reading
from causalreel.nn.policies.interface import ContextPolicy, advance


@dataclass(frozen=True)
class Places:
    """Where a call reads and writes, in frames; equal ones can share a recording."""

    reads: tuple[int, int]
    """Visible context and own frames, as one run of places."""
    writes: int
    """Frames written."""


class CacheMemory:
    """What static caches of one size lie in, one at a time: keys and values of all layers, the rows that a call writes.

    frames: places for latent frames, window and one chunk.
    """

    def __init__(
        self,
        *,
        layers: int,
        heads: int,
        head_dim: int,
        tokens: int,
        frames: int,
        batch: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.tokens, self.frames = tokens, frames
        self._allocate((layers, batch, frames * tokens, heads, head_dim), dtype, device)
        self.places = torch.arange(frames * tokens, device=device)
        self.slots = torch.zeros_like(self.places)
        """Rows that the announced call writes, at the start."""
        self._guest: weakref.ref[StaticCache] | None = None

    # ---- what lies where; `nn.fp8_attention` has another layout ----

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> None:
        """shape: layers, batch, rows, heads, width of a head."""
        self.buffer = torch.zeros(shape[0], 2, *shape[1:], dtype=dtype, device=device)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is held."""
        return self.buffer, self.places, self.slots

    def keys(self, layer: int) -> Tensor:
        """All places of a layer's keys (B,rows,N,D)."""
        return self.buffer[layer, 0]

    def values(self, layer: int) -> Tensor:
        return self.buffer[layer, 1]

    def store(self, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> None:
        """Write k, v (B,L,N,D) to `rows` (L)."""
        self.keys(layer).index_copy_(1, rows, k.to(self.buffer.dtype))
        self.values(layer).index_copy_(1, rows, v.to(self.buffer.dtype))

    def view(self, layer: int, rows: slice) -> tuple[Tensor, Tensor]:
        """Keys and values (B,Lk,N,D) that lie there."""
        return self.keys(layer)[:, rows], self.values(layer)[:, rows]

    def copy(self, source: int, target: int, length: int) -> None:
        """`length` rows of all layers, from row to row."""
        self.buffer[:, :, :, target : target + length].copy_(self.buffer[:, :, :, source : source + length])

    def save(self, rows: slice, into: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        """Copy rows of all layers to where `into` has them, or to new tensors as large as the memory."""
        away = into or (torch.empty_like(self.buffer),)
        away[0][:, :, :, rows].copy_(self.buffer[:, :, :, rows])
        return away

    def restore(self, rows: slice, away: tuple[Tensor, ...]) -> None:
        """Copy back what `save` has copied."""
        self.buffer[:, :, :, rows].copy_(away[0][:, :, :, rows])

    # ---- whose turn it is ----

    @property
    def guest(self) -> StaticCache | None:
        """Whose frames lie here; None if that rollout is over."""
        return None if self._guest is None else self._guest()

    def admit(self, cache: StaticCache) -> None:
        """Make `cache` the guest; what the one before it still needs is copied away."""
        before = self.guest
        if before is cache:
            return
        if self.places.is_cuda:
            torch.cuda.synchronize(self.places.device)  # the guest may have used another stream
        if before is not None:
            before.move_out()
        cache.move_in()
        self._guest = weakref.ref(cache)


class StaticCache:
    """Context of one rollout, in a memory that it may share with others, as long as they take turns in one thread:
    between a call and its commit no other one may begin a call.

    frames: latent frames of the whole video, None if endless; the smaller of it and the window decides the size. chunk:
    frames generated together; all chunks, prefix included, have this size. Raises ValueError where the layout does not
    fit; `fits` asks before, `places` says how large the memory must be.
    """

    def __init__(self, context: ContextPolicy, *, chunk: int, frames: int | None, memory: CacheMemory) -> None:
        if not self.fits(context, chunk, frames):
            raise ValueError(
                f"a static cache needs a finite window or length, and chunks that divide window - sink; got "
                f"{context}, frames={frames}, chunk={chunk}"
            )
        if memory.frames != self.places(context, chunk, frames):
            raise ValueError(f"memory must have {self.places(context, chunk, frames)} frames, got {memory.frames}")
        self.context, self.chunk, self.memory, self.tokens = context, chunk, memory, memory.tokens
        self.window = context.span(frames, chunk) or 0
        self._front = memory.frames - self.window
        """Places for a chunk that leaves; none if the window never overflows."""
        self._away: tuple[Tensor, ...] | None = None
        """What `CacheMemory.save` has made, for the time in which another rollout uses the memory."""
        self.frames: tuple[Frame, ...] = ()
        self.call: Places | None = None
        self._queries: tuple[Frame, ...] = ()
        self._commits: dict[int, tuple[int, int] | None] = {}

    @staticmethod
    def places(context: ContextPolicy, chunk: int, frames: int | None) -> int:
        """Latent frames that the memory must hold: a video that never fills the window needs no room to leave by."""
        window = context.span(frames, chunk)
        assert window is not None
        return window if frames == window else window + chunk

    @staticmethod
    def fits(context: ContextPolicy, chunk: int, frames: int | None, prefix: int = 0) -> bool:
        """Whether such a rollout, behind so many given frames, can use a static cache."""
        if not isinstance(context, Context):
            return False
        if context.window is not None and prefix + chunk > context.window:
            return False  # the given frames are read in one call that does not fit
        window = context.span(frames) or 0
        if context.window is None or (frames is not None and frames <= context.window):
            return window >= chunk and window % chunk == 0
        ring = window - context.sink - chunk
        return ring >= chunk and ring % chunk == 0 and context.sink % chunk == 0

    # ---- what a network asks ----

    def begin(self, queries: tuple[Frame, ...], tokens: int) -> Reading:
        """As FrameCache.begin; also moves what a fused call with a full window needs, and sets `call` and `slots`."""
        c, start, end = self.chunk, queries[0].chunk_start, queries[-1].chunk_end
        if tokens != self.tokens:
            raise ValueError(f"the cache was made for {self.tokens} tokens a frame, the call has {tokens}")
        if any(f.chunk_end - f.chunk_start != c for f in queries):
            raise ValueError(f"the cache was made for chunks of {c} frames; the call has others: {queries}")
        if start != (self.frames[-1].chunk_end if self.frames else 0):
            raise ValueError(f"the call starts at frame {start}, where the cache does not end")
        self.memory.admit(self)
        self._queries = queries
        if end <= self.window:
            visible = (*self.frames, *queries)
            self.call = Places((self._front, self._front + end), end - start)
            self._write_to([(self._front + start, self._front + end)])
            self._commits = dict.fromkeys(range(c, end - start + 1, c))
            if self._front and end == self.window:  # its last chunk lies where the next one will work
                self._commits[end - start] = (self.window, self._place(end - c))
        elif end - start == c:
            visible = (*self._in_ring(start), *queries)
            self.call = Places((c, c + self.window), c)
            self._write_to([(self.window, self.window + c)])
            self._commits = {c: (self.window, self._place(start))}
        elif end - start == 2 * c:
            visible = self._begin_fused(queries, start)
        else:
            raise ValueError(f"with a full window a call has one or two chunks of {c} frames, got {end - start} frames")
        return reading(queries, visible, self.context)

    def _begin_fused(self, queries: tuple[Frame, ...], start: int) -> tuple[Frame, ...]:
        """One chunk goes into the place of the oldest one, which moves to the front; another is denoised behind it."""
        c, place, ring = self.chunk, self._place(start), self._in_ring(start)
        oldest = start - self._ring
        leaving = tuple(f for f in ring if oldest <= f.index < oldest + c)
        self._copy(place, 0)
        stays = sorted((*(f for f in ring if f not in leaving), *queries[:c]), key=lambda f: self._place(f.index))
        self.call = Places((0, self.window + c), 2 * c)
        self._write_to([(place, place + c), (self.window, self.window + c)])
        self._commits = {c: None}
        return (*leaving, *stays, *queries[c:])

    def hear(self, layer: int, q: Tensor) -> None:
        """Rotated queries (B,L,N,D) of the announced call, for a policy that asks them (`nn.static_tokens`)."""

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As FrameCache.extend: writes k, v (B,L,N,D) to `slots` and lends the run that the call reads."""
        self.memory.store(layer, self.slots, k, v)
        return self.memory.view(layer, self.rows)

    def commit(self, frames: int) -> None:
        """As FrameCache.commit; whole chunks only."""
        if frames not in self._commits:
            raise ValueError(f"commit takes {', '.join(map(str, self._commits))} frames of this call, got {frames}")
        self._require_memory()
        move = self._commits[frames]
        if move is not None:
            self._copy(*move)
        self.frames = advance(self.context, self.frames, self._queries[:frames])
        self._queries, self._commits, self.call = (), {}, None

    # ---- sharing the memory ----

    def move_out(self) -> None:
        """Copy the committed frames away, before another rollout uses the memory."""
        held = self._held
        if held.start < held.stop:
            self._away = self.memory.save(held, self._away)

    def move_in(self) -> None:
        """Copy back what `move_out` has copied away."""
        held = self._held
        if self._away is not None and held.start < held.stop:
            self.memory.restore(held, self._away)

    @property
    def _held(self) -> slice:
        """Rows among which all committed frames lie; the place to leave by holds none between calls."""
        end = self.frames[-1].chunk_end if self.frames else 0
        return slice(self._front * self.tokens, min(self._front + end, self.memory.frames) * self.tokens)

    def _require_memory(self) -> None:
        if self.memory.guest is not self:
            raise RuntimeError("another rollout has begun a call between this one's call and its commit")

    # ---- places ----

    @property
    def slots(self) -> Tensor:
        """Rows of keys and values (L) int64 that the announced call writes."""
        assert self.call is not None
        self._require_memory()
        return self.memory.slots[: self.call.writes * self.tokens]

    @property
    def rows(self) -> slice:
        """Rows that the announced call reads, its own frames included."""
        assert self.call is not None
        return slice(*(n * self.tokens for n in self.call.reads))

    @property
    def _ring(self) -> int:
        return self.window - self._sink - self.chunk

    @property
    def _sink(self) -> int:
        assert isinstance(self.context, Context)
        return self.context.sink

    def _place(self, frame: int) -> int:
        """Where a committed frame lies."""
        if frame < self.window - self.chunk:
            return self._front + frame
        return self.chunk + self._sink + (frame - self._sink) % self._ring

    def _in_ring(self, start: int) -> tuple[Frame, ...]:
        """Frames in sink and ring when the next chunk starts at `start`, in the order of their places."""
        assert isinstance(self.context, Context)
        kept = self.context.visible(self.frames, start + self.chunk)
        return tuple(sorted((self.frames[i] for i in kept), key=lambda f: self._place(f.index)))

    def _write_to(self, runs: list[tuple[int, int]]) -> None:
        at = 0
        for first, last in runs:
            count = (last - first) * self.tokens
            rows = self.memory.places[first * self.tokens : last * self.tokens]
            self.memory.slots[at : at + count].copy_(rows)
            at += count

    def _copy(self, source: int, target: int) -> None:
        """One chunk of all layers, from place to place."""
        self.memory.copy(source * self.tokens, target * self.tokens, self.chunk * self.tokens)
