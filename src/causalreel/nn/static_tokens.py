"""A static cache for policies that look at what frames hold: what stays lies first, in order, a call's own behind it.

Keys lie there twice: rotated to where they are read, so that calls read one run as it lies and can be recorded; and as
they were before, so that they can be moved without being rounded each time. A commit writes what the policy keeps over
what was there: slower than the commits of other caches, in memory as flat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from causalreel.nn import kernels
from causalreel.nn.masks import Frame, Reading
from causalreel.nn.policies.interface import ContextPolicy
from causalreel.nn.policies.selecting import Committed, Entries, SelectingPolicy
from causalreel.nn.rope import rope_table, rotate_keys, token_table
from causalreel.nn.static_cache import CacheMemory, Places, StaticCache
from causalreel.nn.token_cache import check_call


@dataclass(frozen=True)
class AskingPlaces(Places):
    """As Places."""

    asks: bool
    """The call's queries are summed, for the policy."""


class TokenMemory(CacheMemory):
    """As CacheMemory, with room for keys as they were before their rotation, and for what queries ask.

    size: rows and columns of a frame's tokens. twins: as in `rope.rotate_keys`.
    """

    def __init__(self, *, size: tuple[int, int], twins: bool, **sizes: Any) -> None:
        self.size, self.twins = size, twins
        super().__init__(**sizes)

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> None:
        super()._allocate(shape, dtype, device)
        layers, batch, rows, heads, width = shape
        self.unturned = torch.zeros(shape, dtype=dtype, device=device)
        """Keys (layers,B,rows,N,D) before rotation, of what is held."""
        self.asked = torch.zeros(layers, batch, rows // self.tokens, heads, width, device=device)
        """The latest call's rotated queries, summed over each frame's tokens, float32; its frames come first."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return *super().tensors, self.unturned, self.asked

    def save(self, rows: slice, into: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        away = into or (torch.empty_like(self.buffer), torch.empty_like(self.unturned))
        away[1][:, :, rows].copy_(self.unturned[:, :, rows])
        return super().save(rows, away)

    def restore(self, rows: slice, away: tuple[Tensor, ...]) -> None:
        super().restore(rows, away)
        self.unturned[:, :, rows].copy_(away[1][:, :, rows])

    def turn_back(self, layer: int, rows: slice, positions: Sequence[int]) -> None:
        """Write keys as they were before their rotation, of frames that lie in `rows` and are read at `positions`."""
        keys = self.keys(layer)[:, rows]
        cos, sin = rope_table(tuple(positions), *self.size, keys.shape[-1], keys.device)
        self.unturned[layer][:, rows].copy_(rotate_keys(keys, (cos, -sin), twins=self.twins))

    def hold(self, layer: int, entries: Entries) -> Entries:
        """Write these over what lies first; -> the same as they lie there."""
        rows = slice(0, len(entries))
        there = replace(entries, keys=self.unturned[layer][:, rows], values=self.values(layer)[:, rows])
        for mine, given in ((there.keys, entries.keys), (there.values, entries.values)):
            lies_here = given.untyped_storage().data_ptr() == mine.untyped_storage().data_ptr()
            mine.copy_(given.clone() if lies_here else given)
        self.turn(there, self.keys(layer)[:, rows])
        return there

    def turn(self, entries: Entries, into: Tensor | None = None) -> Tensor:
        """Keys (B,T,N,D) rotated to their positions, in `into` if given."""
        into = torch.empty_like(entries.keys) if into is None else into
        cos, sin = token_table(entries.positions, entries.tokens, self.size, entries.keys.shape[-1])
        if self.twins:
            return into.copy_(rotate_keys(entries.keys, (cos, sin), twins=True))
        return kernels.turn_into(entries.keys, cos.squeeze(2), sin.squeeze(2), into)


class StaticTokenCache(StaticCache):
    """As StaticCache, for a policy that is asked after every commit; calls of one chunk, `chunk` frames at most."""

    context: SelectingPolicy
    memory: TokenMemory

    def __init__(self, context: ContextPolicy, *, chunk: int, frames: int | None, memory: CacheMemory) -> None:
        super().__init__(context, chunk=chunk, frames=frames, memory=memory)
        self.layers: list[Entries | None] = [None] * len(self.memory.unturned)
        """What every block holds; keys and values are views of the memory."""
        self.end, self.state, self._own = 0, dict[Any, Any](), 0

    @staticmethod
    def places(context: ContextPolicy, chunk: int, frames: int | None) -> int:
        """Latent frames that the memory must hold: those that stay, and a chunk."""
        held = context.most_held(chunk)
        assert held is not None
        return min(held + chunk, frames or held + chunk)

    @staticmethod
    def fits(context: ContextPolicy, chunk: int, frames: int | None, prefix: int = 0) -> bool:
        return isinstance(context, SelectingPolicy) and context.most_held(chunk) is not None

    @property
    def held(self) -> int:
        """Frames' worth of entries of each block."""
        return 0 if self.layers[0] is None else len(self.layers[0]) // self.tokens

    def begin(self, queries: tuple[Frame, ...], tokens: int) -> Reading:
        """As FrameCache.begin; sets `call` and `slots`."""
        if tokens != self.tokens:
            raise ValueError(f"the cache was made for {self.tokens} tokens a frame, the call has {tokens}")
        check_call(self.context, queries, self.end)
        held, last = self.held, self.held + len(queries)
        if last > self.memory.frames:
            raise ValueError(
                f"the cache has room for {self.memory.frames - held} more frames, the call has {last - held}"
            )
        self.memory.admit(self)
        self._queries, self._own = queries, self.context.first_position(self.end, held)
        self._write_to([(held, last)])
        self.call = AskingPlaces((0, last), last - held, self.context.asks_queries)
        return Reading(tuple(range(self._own, self._own + len(queries))))

    def hear(self, layer: int, q: Tensor) -> None:
        """Rotated queries (B,L,N,D) of the announced call, for a policy that asks them."""
        if self.context.asks_queries:
            frames = len(self._queries)
            asked = torch.unflatten(q, 1, (frames, -1)).sum(2, dtype=torch.float32)
            self.memory.asked[layer][:, :frames].copy_(asked)

    @torch.no_grad()
    def commit(self, frames: int) -> None:
        """As FrameCache.commit; then the policy says what stays."""
        if not 0 < frames <= len(self._queries):
            raise ValueError(f"commit takes 1 to {len(self._queries)} frames of the latest call, got {frames}")
        self._require_memory()
        layers = self._with_new(frames)
        self.end, self.state = self.end + frames, dict(self.state)
        asked = [asked[:, :frames] for asked in self.memory.asked] if self.context.asks_queries else []
        now = Committed(layers, frames, self.end, self.tokens, asked, self.memory.turn, self.state)
        for layer, stays in enumerate(self.context.settle(now)):
            self.layers[layer] = stays if stays is layers[layer] else self.memory.hold(layer, stays)
        self._queries, self.call = (), None

    def _with_new(self, frames: int) -> list[Entries]:
        """Of every block what is held, and so many frames of the latest call behind it."""
        memory, first, positions = self.memory, self.held * self.tokens, range(self._own, self._own + frames)
        rows = slice(first, first + frames * self.tokens)
        marks = self._marks(frames, memory.unturned.shape[1])
        layers: list[Entries] = []
        for layer, held in enumerate(self.layers):
            memory.turn_back(layer, rows, positions)
            before = (held.frames, held.tokens, held.positions) if held is not None else None
            joined = marks if before is None else [torch.cat(pair, dim=1) for pair in zip(before, marks, strict=True)]
            layers.append(
                Entries(memory.unturned[layer][:, : rows.stop], memory.values(layer)[:, : rows.stop], *joined)
            )
        return layers

    def _marks(self, frames: int, batch: int) -> list[Tensor]:
        """Frames, tokens and positions (B,L) of the latest call's entries."""
        index = torch.arange(frames * self.tokens, device=self.memory.places.device).expand(batch, -1)
        frame = index // self.tokens
        return [frame + self.end, index % self.tokens, frame + self._own]

    @property
    def _held(self) -> slice:
        return slice(0, self.held * self.tokens)
